"""A Megatron user's command line: what each option of Megatron-LM and of its relatives is answered here.

ignored.py, refused.py and renamed.py are the answers as data, joint.py those of options that mean something together;
translation.py reads a command line by them. docs/megatron_arguments.md is made of the same tables (page.py).
"""
