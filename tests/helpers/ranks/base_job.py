"""What a rank does in a test of a base that is kept in fewer bits."""

from dataclasses import dataclass, replace

from cases import SEQ_LENGTH, Case
from job import FLOAT64, Record, spec_of, train

from megatron_deepseek.model.architecture.base_weights import BLOCKS, BaseSettings
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.planning.pipeline_balance import stages


@dataclass(frozen=True)
class BaseCase(Case):
    """Two ranks of any axis have whole blocks of columns of everything that they divide. `bits` is of the base."""

    lora: str = "all+router+mtp"
    mtp: int = 1
    bits: int = 4

    @property
    def model(self) -> ModelConfig:
        width = 2 * BLOCKS[self.bits]
        wide = replace(super().model, vocab_size=64, hidden_size=width, intermediate_size=width, initializer_range=0.05)
        wide = replace(wide, **dict(moe_intermediate_size=width) if wide.n_routed_experts else {})
        return replace(wide, **dict(head_dim=width // 4) if wide.grouped_query else dict(
            kv_lora_rank=64, q_lora_rank=self.attention_fields["q_lora_rank"] and 64, qk_nope_head_dim=width // 4,
            qk_rope_head_dim=width // 4, v_head_dim=width // 4))

    @property
    def base(self) -> BaseSettings:
        return BaseSettings(self.bits)


def run_base(case: BaseCase, num_steps: int = 1, precision: Precision = FLOAT64, length: int = SEQ_LENGTH) -> Record:
    spec = spec_of(case, precision, length)
    sizes = case.first_batch_size, case.global_batch_size
    return train(replace(spec, build=replace(spec.build, base=case.base)), case.layout, sizes, num_steps, case.packed,
                 case.padded, case.objective)


def run_base_alone(case: BaseCase, num_steps: int = 1, precision: Precision = FLOAT64, length: int = SEQ_LENGTH
                   ) -> Record:
    """What one process computes, of the batch as a whole."""
    spec, reference = spec_of(case, precision, length), case.reference
    spec = replace(spec, stages=stages(case.model, 1, length), schedule="none",
                   micro_batch_size=reference.micro_batch_size)
    build = replace(spec.build, base=case.base, loss=reference.loss, reshard_after_forward=False)
    sizes = case.first_batch_size, case.global_batch_size
    return train(replace(spec, build=build), Layout(), sizes, num_steps, case.packed, case.padded, case.objective)
