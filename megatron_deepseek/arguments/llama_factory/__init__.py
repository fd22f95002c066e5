"""LLaMA-Factory's files and command lines, in the arguments of this project (tools/translate_arguments.py).

reading.py reads them, recipe.py holds one while it is translated. model.py, data.py and training.py are functions that
each translate some keys; keys.py lists, as data, those that nothing here stands for. translation.py puts all together.
"""
