"""A reference model whose adapters drop features of their input: the mask by Python's integers, product by product.

    y = W x + scale * B A (x * kept / (1 - p))

Of a hash of 64 bits, feature i has the bits 16 (i mod 4) and following of number i // 4; as a signed number they are to
be at least p * 2**16 - 2**15. The hash of a token is keyed by its key and the weight's name, of experts also by their
number, before the name.
"""

import hashlib
from functools import cache

import torch
import torch.nn.functional as F
from reference_model import ReferenceModel

from megatron_deepseek.model.architecture.adapters import LoraSettings, factor_name

WORD = 2**64


def mixed(counter: int, key: int) -> int:
    """SplitMix64's number at `counter`, as published, from the state `key`."""
    z = (counter * 0x9E3779B97F4A7C15 + key) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def stream(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def token_key(seed: int, sample: int, position: int) -> int:
    return mixed(position, mixed(sample, stream(f"{seed}:dropout")))


@cache
def is_kept(key: int, name: str, feature: int, rate: float) -> bool:
    bits = mixed(feature // 4, mixed(key, stream(f"dropout:{name}"))) >> 16 * (feature % 4) & 0xFFFF
    return (bits - 2**16 if bits >= 2**15 else bits) >= rate * 2**16 - 2**15


class DroppingModel(ReferenceModel):
    """`keys_BS`: of each token, as Python's integers. `factors`: A and B by their names, which get gradients."""

    def __init__(self, config, weights, rope_2SD, softmax_scale, lora: LoraSettings,
                 factors: dict[str, torch.Tensor], keys_BS: list[list[int]]):
        super().__init__(config, weights, rope_2SD, softmax_scale)
        self.lora, self.factors, self.keys_BS = lora, factors, keys_BS
        self.row = 0  # of the sequence whose attention comes next
        self.tokens = torch.empty(0)  # what the last router saw

    def dropped(self, x: torch.Tensor, keys: list, name: str) -> torch.Tensor:
        """Rows of x and their keys may be nested lists of the same shape."""
        if x.ndim > 1:
            return torch.stack([self.dropped(row, key, name) for row, key in zip(x, keys, strict=True)])
        rate = self.lora.lora_dropout
        kept = torch.tensor([is_kept(keys, name, feature, rate) for feature in range(len(x))])
        return x.where(kept, 0) / (1 - rate)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = super().linear(x, name)
        a = self.factors.get(factor_name(f"{name}.weight", "lora_A"))
        if name.endswith(".gate"):
            self.tokens = x.detach().flatten(0, 1)
        if a is None:
            return y
        keys = self.keys_BS if x.ndim == 3 else self.keys_BS[self.row % len(self.keys_BS)]
        b = self.factors[factor_name(f"{name}.weight", "lora_B")]
        return y + self.lora.scale * F.linear(F.linear(self.dropped(x, keys, f"{name}.weight"), a), b)

    def attention(self, x_SH: torch.Tensor, name: str) -> torch.Tensor:
        y = super().attention(x_SH, name)
        self.row += 1
        return y

    def expert(self, x_H: torch.Tensor, name: str, index: int) -> torch.Tensor:
        (place,) = (self.tokens == x_H).all(-1).nonzero().flatten().tolist()
        key = mixed(index, sum(self.keys_BS, [])[place])
        gate, up = (self.weights[f"{name}.experts.gate_up_proj"][index] @ x_H).chunk(2)
        of_gate, of_up = self.of_expert(x_H, key, f"{name}.experts.gate_up_proj", index, 2)
        gate, up = gate + of_gate, up + of_up
        hidden = gate * gate.sigmoid() * up
        (more,) = self.of_expert(hidden, key, f"{name}.experts.down_proj", index, 1)
        return self.weights[f"{name}.experts.down_proj"][index] @ hidden + more

    def of_expert(self, x: torch.Tensor, key: int, name: str, index: int, matrices: int) -> list[torch.Tensor]:
        a, b = (self.factors[factor_name(name, which)][index] for which in ("lora_A", "lora_B"))
        x = self.dropped(x, key, name)
        return [self.lora.scale * own_b @ (own_a @ x) for own_a, own_b in zip(a.chunk(matrices), b.chunk(matrices))]
