"""Reward functions that do what nobody expects of them, each where a completion says "bad"."""

import ctypes
import os
import signal
import sys

CALLS = []


def good(prompts, completions, rows):
    return [len(completion) / 10 for completion in completions]


def counts(prompts, completions, rows):
    """The size of the batch, and how often this process was asked before."""
    CALLS.append(len(completions))
    return [100 * len(CALLS) + len(completions)] * len(completions)


def throws(prompts, completions, rows):
    print("a line on standard output", flush=True)
    if "bad" in completions:
        raise KeyError("two\nlines")
    return [1.0] * len(completions)


def hangs(prompts, completions, rows):
    """In C, with Python's lock, deaf to SIGTERM."""
    if "bad" in completions:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(600)
    return [2] * len(completions)


def always_hangs(prompts, completions, rows):
    """It leaves a line where a row says."""
    with open(rows[0]["calls"], "a") as file:
        file.write(f"{len(completions)}\n")
    ctypes.PyDLL(None).sleep(600)


def exits(prompts, completions, rows):
    if "bad" in completions:
        os._exit(0)
    return (3 for _ in completions) if "generator" in completions else [3] * len(completions)


def leaves(prompts, completions, rows):
    if "bad" in completions:
        sys.exit(7)
    return [True] * len(completions)


def eats(prompts, completions, rows):
    hoard = bytearray(40 * 2**30) if "bad" in completions else b""
    return [len(hoard)] * len(completions)


def not_numbers(prompts, completions, rows):
    values = {"bad": float("nan"), "worse": float("inf"), "text": "1.0", "none": None}
    return [values.get(completion, 1) for completion in completions]


def too_few(prompts, completions, rows):
    return [1.0]


def no_list(prompts, completions, rows):
    return "abcd"


def copies_itself(prompts, completions, rows):
    os.fork()
    return [0.5] * len(completions)


def sees_rows(prompts, completions, rows):
    return [row["number"] + len(prompt) for prompt, row in zip(prompts, rows)]
