"""Rewards of one's own: --reward examples/rewards.py:short --reward examples/rewards.py:shortest_of_group:0.5

docs/rewards.md has the contract. Nothing of megatron_deepseek needs to be imported.
"""

import re


def short(prompts, completions, rows):
    """Return 1 for an answer of at most 20 words; rows without "short": true have no opinion on that."""
    answers = [completion.rpartition("</think>")[2] for completion in completions]
    return [float(len(answer.split()) <= 20) if row.get("short") else None for answer, row in zip(answers, rows)]


def nearest(prompts, completions, rows):
    """Return how near the last number of an answer is to the row's "answer": 1 for equal, 1/2 for a difference of 1."""
    found = [re.findall(r"-?\d+(?:\.\d+)?", completion) for completion in completions]
    return [1 / (1 + abs(float(numbers[-1]) - float(row["answer"]))) if numbers else 0.0
            for numbers, row in zip(found, rows)]


def shortest_of_group(prompts, completions, rows):
    """Return 1 for the shortest completion of each prompt in the batch, else 0: a function sees the whole batch."""
    least = {}
    for prompt, completion in zip(prompts, completions):
        least[prompt] = min(len(completion), least.get(prompt, len(completion)))
    return [float(len(completion) == least[prompt]) for prompt, completion in zip(prompts, completions)]
