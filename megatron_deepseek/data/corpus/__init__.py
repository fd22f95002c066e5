"""Raw text to indexed datasets, in fixed memory and in parts that a killed run continues from.

settings.py    what is asked for                    inputs.py, streams.py   files, globs, directories, compression
plan.py        the input cut into parts             records.py, long_text.py   bytes to documents, whatever their size
encoders.py    gigatoken or tokenizers              cutting.py   long texts in pieces, with the same ids
part.py        one part, from input to dataset      workers.py   processes that make parts
selection.py   duplicates, limits, shuffling        assembly.py  parts to the final datasets
report.py      what happened                        run.py       the whole of it; command.py its arguments
"""
