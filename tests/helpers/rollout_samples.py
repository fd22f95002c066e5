"""Samples as a rollout would give them, of random ids."""

import torch

from megatron_deepseek.rl.samples import Sample


def random_samples(number: int, group_size: int, longest: int, vocab_size: int, kept: bool = False
                   ) -> tuple[list[Sample], list[float | None]]:
    """Return samples of very different lengths, every fifth of them cut off, and their rewards.

    One reward is unknown, and one group has equal ones. With `kept` a token was drawn among 1 to 4 ids, but some among
    all.
    """
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int, *shape: int) -> list:
        return torch.randint(low, high, shape, generator=generator).tolist()

    samples = []
    for n in range(number):
        prompt, completion = draw(1, longest // 3 + 1), draw(1, 2 * longest // 3 + 1)
        ids = draw(0, vocab_size, prompt + completion)
        own = tuple(_kept(each, vocab_size, generator) for each in ids[prompt:]) if kept else None
        samples.append(Sample(n // group_size, tuple(ids[:prompt]), tuple(ids[prompt:]), "",
                              "length" if n % 5 == 4 else "stop", (0.0,) * completion, kept_ids=own))
    rewards = [float(each) for each in draw(0, 4, number)]
    rewards[:group_size] = [1.0] * group_size
    rewards[-1] = None
    return samples, rewards


def _kept(label: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """The label among others, in any order; nothing for all ids."""
    others = torch.randperm(vocab_size, generator=generator)[:torch.randint(0, 5, (), generator=generator)]
    ids = [*others[others != label].tolist(), label] if len(others) else []
    return torch.tensor(ids, dtype=torch.int32)


def distances(samples: list[Sample], seed: int, scale: float) -> list[list[float]]:
    """Normal numbers, one for each token of a completion."""
    generator = torch.Generator().manual_seed(100 + seed)
    return [(scale * torch.randn(len(sample.tokens), generator=generator)).tolist() for sample in samples]
