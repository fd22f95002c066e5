"""The architecture: one frozen dataclass, read from and written to Hugging Face's config.json.

Field names are Hugging Face's (`DeepseekV2Config`, `DeepseekV3Config`), so that a released config.json is read as it
is. Nothing about training or parallelism lives here: the same `ModelConfig` describes a checkpoint in any layout.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture import hf_config


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past `original_max_position_embeddings` (YaRN: arXiv 2309.00071).

    `kind` is Hugging Face's `rope_type`: linear, dynamic or yarn. The other fields apply to yarn, `factor` to all.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        if self.kind not in ("linear", "dynamic", "yarn"):
            raise ValueError(f"rope_scaling type {self.kind!r} is not one of linear, dynamic, yarn")
        if self.factor < 1:
            raise ValueError(f"rope_scaling factor {self.factor} is smaller than 1")


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V2 or V3 architecture. Without routed experts every layer is dense.

    `scoring_func`: softmax (V2) or sigmoid (V3). `topk_method`: greedy, group_limited_greedy (V2) or noaux_tc (V3).
    `num_nextn_predict_layers`: depth of Multi-Token Prediction (V3 report, section 2.2).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.0
    seq_aux: bool = True
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd; rotary embedding turns pairs")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func {self.scoring_func!r} is not one of softmax, sigmoid")
        if self.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise ValueError(f"topk_method {self.topk_method!r} is not one of greedy, group_limited_greedy, noaux_tc")
        for name in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}; it must be at least 1, or null for no compression")
        if self.n_routed_experts:
            self._check_experts()

    def _check_experts(self):
        if self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size {self.moe_intermediate_size} with "
                             f"n_routed_experts {self.n_routed_experts}; it must be at least 1")
        if self.moe_layer_freq < 1:
            raise ValueError(f"moe_layer_freq is {self.moe_layer_freq}; it must be at least 1")
        if self.n_group < 1 or self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {self.n_group}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is not between 1 and n_group {self.n_group}")
        limited = self.topk_method != "greedy"
        reachable = self.n_routed_experts // self.n_group * self.topk_group if limited else self.n_routed_experts
        if not 1 <= self.num_experts_per_tok <= reachable:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and "
                             f"the {reachable} experts that a token can reach")
        if self.topk_method == "noaux_tc" and self.n_routed_experts // self.n_group < 2:
            raise ValueError(f"topk_method noaux_tc scores a group by its best two experts, but n_routed_experts "
                             f"{self.n_routed_experts} over n_group {self.n_group} leaves one")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def model_type(self) -> str:
        return "deepseek_v3" if self.topk_method == "noaux_tc" or self.scoring_func == "sigmoid" else "deepseek_v2"

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` routes to experts; MTP modules, whose ids follow the last layer's, always do."""
        if not self.n_routed_experts:
            return False
        if index >= self.num_hidden_layers:
            return True
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers that route to experts, MTP modules not counted."""
        return sum(self.is_moe_layer(index) for index in range(self.num_hidden_layers))

    @classmethod
    def from_hf_dict(cls, fields: dict) -> "ModelConfig":
        """Reads a parsed config.json of model_type deepseek_v2 or deepseek_v3; see hf_config.py for the dialects."""
        fields = hf_config.normalise(fields)
        scaling = fields.pop("rope_scaling")
        return cls(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None)

    def to_hf_dict(self) -> dict:
        """The fields of a released config.json: DeepSeek's own code and transformers 4 and 5 read it."""
        return hf_config.released_fields(self)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads a config.json, or that of a directory."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        fields = dict(read_object(path).fields)
        try:
            return cls.from_hf_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def attention_parameters(self) -> int:
        """MLA's weights in one layer, both latent norms and the biases of the projections from the hidden states."""
        query = self.num_attention_heads * self.qk_head_dim
        rank, kv_a = self.q_lora_rank, self.kv_lora_rank + self.qk_rope_head_dim
        total = self.hidden_size * query if rank is None else (self.hidden_size + query + 1) * rank
        total += self.hidden_size * kv_a + self.kv_lora_rank
        total += self.kv_lora_rank * self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)
        total += self.num_attention_heads * self.v_head_dim * self.hidden_size
        if self.attention_bias:
            total += (rank or 0) + kv_a + self.hidden_size
        return total

    def mlp_parameters(self, index: int, active: bool = False) -> int:
        """The MLP of layer `index`: dense, or router with experts; `active`: of the routed, only a token's top k.

        The router's bias is none: it is not trained but moved by counts.
        """
        if not self.is_moe_layer(index):
            return 3 * self.hidden_size * self.intermediate_size
        routed = self.num_experts_per_tok if active else self.n_routed_experts
        router = self.n_routed_experts * self.hidden_size
        return router + 3 * self.hidden_size * self.moe_intermediate_size * (routed + self.n_shared_experts)

    def layer_parameters(self, index: int, active: bool = False) -> int:
        return self.attention_parameters() + self.mlp_parameters(index, active) + 2 * self.hidden_size

    def mtp_parameters(self, active: bool = False) -> int:
        """One MTP module's own weights: its layer, eh_proj and three norms; embedding and head are the model's."""
        own = 2 * self.hidden_size * self.hidden_size + 3 * self.hidden_size
        return self.layer_parameters(self.num_hidden_layers, active) + own

    def num_parameters(self) -> int:
        """All that are trained: the model's and those of its MTP modules, which share embedding and head with it."""
        return self.main_parameters() + self.num_nextn_predict_layers * self.mtp_parameters()

    def main_parameters(self) -> int:
        """Parameters of the model without its MTP modules, as the reports count (671B for V3)."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.hidden_size + sum(map(self.layer_parameters, range(self.num_hidden_layers)))

    def describe_parameters(self) -> str:
        """The count that every command tells: "4,215,008 parameters (504,544 of MTP), 1,777,152 active for a token"."""
        mtp = self.num_parameters() - self.main_parameters()
        return (f"{self.num_parameters():,} parameters" + (f" ({mtp:,} of MTP)" if mtp else "")
                + f", {self.num_active_parameters():,} active for a token")

    def num_active_parameters(self) -> int:
        """Parameters that one token is multiplied with, without MTP. The embedding, a lookup, does not count."""
        layers = (self.layer_parameters(index, active=True) for index in range(self.num_hidden_layers))
        return self.vocab_size * self.hidden_size + self.hidden_size + sum(layers)
