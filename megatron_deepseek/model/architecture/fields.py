"""The fields of an architecture, and beside each field all that is said of it: the one place where a field is added.

Field names are Hugging Face's (`DeepseekV2Config`, `DeepseekV3Config`), so that a released config.json is read as it
is. What other code needs to know of a field stands in its `Rule`: config.json's dialects (hf_config.py, hf_keys.py),
the command line (arguments/model_options.py) and the comparison with a checkpoint (matching.py) derive from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from megatron_deepseek.model.architecture.rope_scaling import RopeScaling

# When a checkpoint and a run must agree in a field. WEIGHTS: always, since names, shapes or the meaning of weights
# depend on it. FORWARD: unless weights alone are taken over on purpose, as where the context is extended.
WEIGHTS, FORWARD = "weights", "forward"
# When config.json must have a key, if its family has it. GROUPS: where experts are chosen by groups.
ALWAYS, WITH_EXPERTS, WITH_GROUPS = "always", "with experts", "with groups"
# Which attention has a field: keys and values made of a latent (MLA), or projected heads that queries share (GQA, MHA).
LATENT, GROUPED = "latent", "grouped-query"
FULL_LAYER, SLIDING_LAYER = "full_attention", "sliding_attention"  # values of layer_types, as Hugging Face calls them
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
    when config.json must have it. `of_experts`: a dense model has no use for it. `attention`: LATENT or GROUPED where
    the other attention has no such field, which is None there. `null`: the value that null means in config.json.
    `option`: its name on the command line. `rotary`: hf_rope.py reads and writes it; `sliding`: hf_window.py.
    `implied`: the family says it, config.json never.
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
    attention: str | None = None
    sliding: bool = False
    implied: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, naming the field, for a value out of its bounds."""
        if self.least is not None and value is not None and value < self.least:
            bound = "it must not be negative" if self.least == 0 else f"it must be at least {self.least}"
            raise ValueError(f"{name} is {value}; {bound}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(self.choices)}")


def _field(option: str = "", kind: str = "", text: str = "", *, default: Any = MISSING, **rule: Any) -> Any:
    """Declare a field; `option`, `kind` and `text` are the parts of its Option, `rule` is Rule's other fields."""
    given = Rule(option=Option(option, kind, text) if option else None, **rule)
    return field(default=default, metadata={"rule": given})


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
    kv_lora_rank: int | None = _field("--kv-lora-rank", "positive_int", "rank of the latent that keys and values share",
                                      default=None, match=WEIGHTS, least=1, needed=ALWAYS, attention=LATENT)
    qk_nope_head_dim: int | None = _field("--qk-head-dim", "positive_int",
                                          "head size of queries and keys without the rotary part",
                                          default=None, match=WEIGHTS, least=1, needed=ALWAYS, attention=LATENT)
    qk_rope_head_dim: int | None = _field("--qk-pos-emb-head-dim", "positive_int", "rotary part of the head size",
                                          default=None, match=WEIGHTS, least=1, needed=ALWAYS, attention=LATENT)
    v_head_dim: int | None = _field("--v-head-dim", "positive_int", "head size of values",
                                    default=None, match=WEIGHTS, least=1, needed=ALWAYS, attention=LATENT)
    q_lora_rank: int | None = _field("--q-lora-rank", "count", "rank of the queries' compression; 0 for none",
                                     default=None, match=WEIGHTS, needed=ALWAYS, null=None, attention=LATENT)
    num_key_value_heads: int | None = _field("--num-query-groups", "positive_int",
                                             "heads of keys and values of grouped-query attention",
                                             default=None, match=WEIGHTS, least=1, needed=ALWAYS, null=None,
                                             attention=GROUPED)
    head_dim: int | None = _field("--kv-channels", "positive_int", "head size of grouped-query attention",
                                  default=None, match=WEIGHTS, least=1, null=None, attention=GROUPED)
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
    partial_rotary_factor: float = _field("--rotary-percent", "fraction",
                                          "part of each head that grouped-query attention turns, from its beginning on",
                                          default=1.0, match=FORWARD, rotary=True)
    rms_norm_eps: float = _field("--norm-epsilon", "positive", "epsilon of RMSNorm", default=1e-6, match=FORWARD)
    initializer_range: float = _field("--init-method-std", "positive", "standard deviation of the initial weights",
                                      default=0.02)
    tie_word_embeddings: bool = _field(default=False, match=WEIGHTS)
    attention_bias: bool = _field(default=False, match=WEIGHTS)
    qkv_bias: bool = _field(default=False, match=WEIGHTS, implied=True)
    qk_norm: bool = _field(default=False, match=WEIGHTS, implied=True)
    reward_head: bool = _field(default=False, match=WEIGHTS, implied=True)
    sliding_window: int | None = _field(default=None, match=FORWARD, least=1, null=None, sliding=True)
    layer_types: tuple[str, ...] = _field(default=(), match=FORWARD, sliding=True)
    attention_dropout: float = _field("--attention-dropout", "fraction", "accepted as 0 only", default=0.0, null=0.0)
    bos_token_id: int | None = _field(default=None, null=None)
    eos_token_id: int | None = _field(default=None, null=None)

    def __post_init__(self):
        for name, rule in RULES.items():
            rule.check(name, getattr(self, name))
        kind, other = (GROUPED, LATENT) if self.grouped_query else (LATENT, GROUPED)
        for name, rule in RULES.items():
            if rule.attention == other and getattr(self, name) is not None:
                raise ValueError(f"{name} {getattr(self, name)} is of {other} attention; "
                                 f"kv_lora_rank {self.kv_lora_rank} says that this is {kind} attention")
            if rule.attention == kind and rule.least and getattr(self, name) is None:
                raise ValueError(f"{name} is missing, which {kind} attention has")
        check = self._check_grouped_query if self.grouped_query else self._check_latent
        check()
        if self.n_routed_experts:
            self._check_experts()

    def _check_latent(self):
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd; rotary embedding turns pairs")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}; it must be at least 1, or null for no compression")
        scaling = self.rope_scaling
        if scaling is not None and (scaling.kind == "llama3" or scaling.attention_factor is not None):
            raise ValueError("rope_scaling of type llama3, or with attention_factor, is of grouped-query attention")
        for name in ("qkv_bias", "qk_norm", "sliding_window", "layer_types", "partial_rotary_factor"):
            if getattr(self, name) != DEFAULTS[name]:
                raise ValueError(f"{name} {getattr(self, name)} is of grouped-query attention; "
                                 f"kv_lora_rank {self.kv_lora_rank} says that this is latent attention")

    def _check_grouped_query(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor is {self.partial_rotary_factor}; it must be above 0, at most 1")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(f"head_dim {self.head_dim} times partial_rotary_factor {self.partial_rotary_factor} gives "
                             f"{self.rotary_dim} rotary dimensions; rotary embedding turns pairs")
        scaling, usual = self.rope_scaling, (1.0, 0.0)
        mscales = (scaling.mscale, scaling.mscale_all_dim) if scaling is not None else usual
        if mscales != usual and not (scaling.kind == "yarn" and all(mscales)):
            raise ValueError(f"rope_scaling mscale {mscales[0]} and mscale_all_dim {mscales[1]}: grouped-query "
                             "attention takes both or neither, with type yarn")
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias, of q, k, v and o, and qkv_bias, of q, k, v alone, exclude each other")
        if (self.sliding_window is None) != (not self.layer_types):
            raise ValueError(f"sliding_window {self.sliding_window} and layer_types {self.layer_types} go together")
        strange = [each for each in self.layer_types if each not in (FULL_LAYER, SLIDING_LAYER)]
        if strange:
            raise ValueError(f"layer_types {strange[0]!r} is not one of {FULL_LAYER}, {SLIDING_LAYER}")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for num_hidden_layers "
                             f"{self.num_hidden_layers}")

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
    def grouped_query(self) -> bool:
        """Return whether keys and values are projected heads that queries share (GQA, MHA), and not made of a latent.
        """
        return self.kv_lora_rank is None

    @property
    def qk_head_dim(self) -> int:
        """Return the size of a query or key head, its rotary part included."""
        return self.head_dim if self.grouped_query else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_head_dim(self) -> int:
        """Return the size of a value head."""
        return self.head_dim if self.grouped_query else self.v_head_dim

    @property
    def rotary_dim(self) -> int:
        """Return how many dimensions of a query or key head are turned by RoPE: the last of MLA's, the first of others.
        """
        return int(self.head_dim * self.partial_rotary_factor) if self.grouped_query else self.qk_rope_head_dim

    @property
    def num_kv_heads(self) -> int:
        """Return how many heads of keys and values the softmax sees: with MLA as many as queries."""
        return self.num_key_value_heads if self.grouped_query else self.num_attention_heads

    def window_of(self, index: int) -> int | None:
        """Return to how many tokens, itself among them, a token of layer `index` attends; None to all before it.

        MTP modules, whose ids follow the last layer's, have none.
        """
        sliding = index < len(self.layer_types) and self.layer_types[index] == SLIDING_LAYER
        return self.sliding_window if sliding else None

    def is_moe_layer(self, index: int) -> bool:
        """Return whether layer `index` routes to experts; MTP modules, whose ids follow the last layer's, always do."""
        if not self.n_routed_experts:
            return False
        if index >= self.num_hidden_layers:
            return True
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    def place_among_moe(self, index: int) -> int | None:
        """Return how many MoE layers come before layer `index`; None for a dense layer and for MTP modules."""
        if index >= self.num_hidden_layers or not self.is_moe_layer(index):
            return None
        return sum(self.is_moe_layer(before) for before in range(index))

    @property
    def num_moe_layers(self) -> int:
        """Return how many decoder layers route to experts, MTP modules not counted."""
        return sum(self.is_moe_layer(index) for index in range(self.num_hidden_layers))


RULES: Mapping[str, Rule] = MappingProxyType({each.name: each.metadata["rule"] for each in fields(ArchitectureFields)})
TYPES: Mapping[str, Any] = MappingProxyType({each.name: each.type for each in fields(ArchitectureFields)})
DEFAULTS: Mapping[str, Any] = MappingProxyType({each.name: each.default for each in fields(ArchitectureFields)
                                                if each.default is not MISSING})
