"""Raw text to indexed datasets, in fixed memory and in parts that a killed run continues from.

settings.py      what is asked for                   inputs.py, streams.py     files, globs, compression
plan.py          the input cut into parts            records.py, long_text.py  bytes to documents, whatever their size
encoders.py      gigatoken or tokenizers             cutting.py                long texts in pieces, with the same ids
sentences.py, fim.py, documents.py                   a document's texts to ids
part.py          one part, from input to dataset     workers.py, ledger.py     who makes it, and what is there already
selection.py, assembly.py                            duplicates, limits, order; the parts to the final datasets
finished.py, files.py                                what is finished already; small files, whole or not at all
report.py, progress.py                               what happened
run.py           the whole of it                     command.py                its arguments
"""
