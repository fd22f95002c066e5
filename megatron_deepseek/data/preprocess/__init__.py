"""Preprocessing: raw text to indexed datasets, in fixed memory and in parts that a killed run continues from.

The modules, in the order of the work; run.py calls them all, and cli/preprocess_data.py has the command line.

settings.py      what the user asked for             inputs.py, streams.py     input files, globs, compression
plan.py          the input cut into parts            records.py, long_text.py  bytes to documents, whatever their size
texts.py         a document's text, held or read     sample.py                 texts from the head of the input
encoders.py      gigatoken or tokenizers             cutting.py                long texts in pieces, with the same ids
sentences.py, fim.py, documents.py                   a document's texts to ids
part.py          one part, from input to dataset     workers.py, ledger.py     the processes; the parts made so far
selection.py, assembly.py                            duplicates, limits, order; the parts to the final datasets
finished.py, files.py                                datasets that exist already; small files, whole or not at all
progress.py, report.py                               the progress bar; the report of a run
"""
