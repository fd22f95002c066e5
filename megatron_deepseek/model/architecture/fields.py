"""The fields of an architecture, and beside each field all that is said of it: the one place where a field is added.

Field names are Hugging Face's (`DeepseekV2Config`, `DeepseekV3Config`), so that a released config.json is read as it
is. What other code needs to know of a field stands in its `Rule`: config.json's dialects (hf_config.py, hf_keys.py),
the command line (arguments/model_options.py) and the comparison with a checkpoint (matching.py) derive from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any

# When a checkpoint and a run must agree in a field. WEIGHTS: always, since names, shapes or the meaning of weights
# depend on it. FORWARD: unless weights alone are taken over on purpose, as where the context is extended.
WEIGHTS, FORWARD = "weights", "forward"
# When config.json must have a key. GROUPS: where experts are chosen by groups.
ALWAYS, WITH_EXPERTS, WITH_GROUPS = "always", "with experts", "with groups"
REFUSED, FAMILY_DEFAULT = "refused", "the family's default"  # what null is in config.json, if it is not a value


@dataclass(frozen=True)
class Option:
    """An option of the command line: its name, the function of arguments/values.py that reads it, and its help."""

    name: str
    kind: str
    help: str


@dataclass(frozen=True)
class Rule:
    """All that is said of a field beside its default.

    `match`: WEIGHTS, FORWARD or None, when a checkpoint must agree; `match_if`: in which architectures, None for all;
    they are given as ArchitectureFields. `least` and `choices` bound its values. `needed`:
    when config.json must have it. `of_experts`: a dense model has no use for it. `null`: the value that null means in
    config.json. `option`: its name on the command line. `rotary`: hf_rope.py reads and writes it.
    """

    match: str | None = None
    match_if: Callable[[Any], bool] | None = None
    least: int | None = None
    choices: tuple[str, ...] = ()
    needed: str | None = None
    of_experts: bool = False
    null: Any = REFUSED
    option: Option | None = None
    rotary: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, naming the field, for a value out of its bounds."""
        if self.least is not None and value < self.least:
            bound = "it must not be negative" if self.least == 0 else f"it must be at least {self.least}"
            raise ValueError(f"{name} is {value}; {bound}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(self.choices)}")


def _field(option: str = "", kind: str = "", text: str = "", *, default: Any = MISSING, **rule: Any) -> Any:
    """Declare a field; `option`, `kind` and `text` are the parts of its Option, `rule` is Rule's other fields."""
    given = Rule(option=Option(option, kind, text) if option else None, **rule)
    return field(default=default, metadata={"rule": given})


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


def _stretches_by_length(config: "ArchitectureFields") -> bool:
    """Return whether the rotary frequencies depend on max_position_embeddings (model/rotary.py)."""
    return config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"


@dataclass(frozen=True)
class ArchitectureFields:
    """The fields of ModelConfig (config.py), with their rules; a value that no model can have raises ValueError."""

    vocab_size: int = _field("--vocab-size", "positive_int", "rows of the embedding",
                             match=WEIGHTS, least=1, needed=ALWAYS)
    hidden_size: int = _field("--hidden-size", "positive_int", "width of the residual stream",
                              match=WEIGHTS, least=1, needed=ALWAYS)
    intermediate_size: int = _field("--ffn-hidden-size", "positive_int", "width of the dense layers' MLP",
                                    match=WEIGHTS, least=1, needed=ALWAYS)
    num_hidden_layers: int = _field("--num-layers", "positive_int", "decoder layers, MTP modules not counted",
                                    match=WEIGHTS, least=1, needed=ALWAYS)
    num_attention_heads: int = _field("--num-attention-heads", "positive_int", "attention heads",
                                      match=WEIGHTS, least=1, needed=ALWAYS)
    kv_lora_rank: int = _field("--kv-lora-rank", "positive_int", "rank of the latent that keys and values share",
                               match=WEIGHTS, least=1, needed=ALWAYS)
    qk_nope_head_dim: int = _field("--qk-head-dim", "positive_int",
                                   "head size of queries and keys without the rotary part",
                                   match=WEIGHTS, least=1, needed=ALWAYS)
    qk_rope_head_dim: int = _field("--qk-pos-emb-head-dim", "positive_int", "rotary part of the head size",
                                   match=WEIGHTS, least=1, needed=ALWAYS)
    v_head_dim: int = _field("--v-head-dim", "positive_int", "head size of values",
                             match=WEIGHTS, least=1, needed=ALWAYS)
    q_lora_rank: int | None = _field("--q-lora-rank", "count", "rank of the queries' compression; 0 for none",
                                     default=None, match=WEIGHTS, needed=ALWAYS, null=None)
    moe_intermediate_size: int = _field("--moe-ffn-hidden-size", "positive_int", "width of one expert",
                                        default=0, match=WEIGHTS, needed=WITH_EXPERTS, null=0)
    n_routed_experts: int = _field("--num-experts", "count", "routed experts; 0 for a dense model",
                                   default=0, match=WEIGHTS, least=0, needed=ALWAYS, null=0)
    n_shared_experts: int = _field(default=0, match=WEIGHTS, least=0, needed=WITH_EXPERTS, null=0)
    num_experts_per_tok: int = _field("--moe-router-topk", "positive_int", "routed experts for each token",
                                      default=0, match=WEIGHTS, needed=WITH_EXPERTS, null=0)
    first_k_dense_replace: int = _field(default=0, match=WEIGHTS, least=0, needed=WITH_EXPERTS, null=0)
    moe_layer_freq: int = _field(default=1, match=WEIGHTS, of_experts=True)
    n_group: int = _field("--moe-router-num-groups", "positive_int", "groups of experts (nodes) for limited routing",
                          default=1, match=WEIGHTS, needed=WITH_GROUPS, null=1)
    topk_group: int = _field("--moe-router-group-topk", "positive_int", "groups that a token may reach",
                             default=1, match=WEIGHTS, needed=WITH_GROUPS, null=1)
    topk_method: str = _field(default="greedy", choices=("greedy", "group_limited_greedy", "noaux_tc"),
                              match=WEIGHTS, of_experts=True, null=FAMILY_DEFAULT)
    scoring_func: str = _field(default="softmax", choices=("softmax", "sigmoid"), match=WEIGHTS, of_experts=True)
    norm_topk_prob: bool = _field(default=False, match=WEIGHTS, needed=WITH_EXPERTS, null=False)
    routed_scaling_factor: float = _field("--moe-router-topk-scaling-factor", "positive",
                                          "factor on the experts' output",
                                          default=1.0, match=WEIGHTS, needed=WITH_EXPERTS)
    aux_loss_alpha: float = _field(default=0.0, of_experts=True, null=0.0)
    seq_aux: bool = _field(default=True, of_experts=True)
    num_nextn_predict_layers: int = _field("--mtp-num-layers", "count", "Multi-Token Prediction modules",
                                           default=0, match=WEIGHTS, least=0, null=0)
    max_position_embeddings: int = _field("--max-position-embeddings", "positive_int", "longest sequence, in tokens",
                                          default=4096, match=FORWARD, match_if=_stretches_by_length, least=1)
    rope_theta: float = _field("--rotary-base", "positive", "base of the rotary frequencies",
                               default=10000.0, match=FORWARD, rotary=True)
    rope_scaling: RopeScaling | None = _field(default=None, match=FORWARD, rotary=True)
    rms_norm_eps: float = _field("--norm-epsilon", "positive", "epsilon of RMSNorm", default=1e-6, match=FORWARD)
    initializer_range: float = _field("--init-method-std", "positive", "standard deviation of the initial weights",
                                      default=0.02)
    tie_word_embeddings: bool = _field(default=False, match=WEIGHTS)
    attention_bias: bool = _field(default=False, match=WEIGHTS)
    attention_dropout: float = _field("--attention-dropout", "fraction", "accepted as 0 only", default=0.0, null=0.0)
    bos_token_id: int | None = _field(default=None, null=None)
    eos_token_id: int | None = _field(default=None, null=None)

    def __post_init__(self):
        for name, rule in RULES.items():
            rule.check(name, getattr(self, name))
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd; rotary embedding turns pairs")
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
        """Return the size of a query or key head, its rotary part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, index: int) -> bool:
        """Return whether layer `index` routes to experts; MTP modules, whose ids follow the last layer's, always do."""
        if not self.n_routed_experts:
            return False
        if index >= self.num_hidden_layers:
            return True
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    @property
    def num_moe_layers(self) -> int:
        """Return how many decoder layers route to experts, MTP modules not counted."""
        return sum(self.is_moe_layer(index) for index in range(self.num_hidden_layers))


RULES: Mapping[str, Rule] = MappingProxyType({each.name: each.metadata["rule"] for each in fields(ArchitectureFields)})
TYPES: Mapping[str, Any] = MappingProxyType({each.name: each.type for each in fields(ArchitectureFields)})
DEFAULTS: Mapping[str, Any] = MappingProxyType({each.name: each.default for each in fields(ArchitectureFields)
                                                if each.default is not MISSING})
