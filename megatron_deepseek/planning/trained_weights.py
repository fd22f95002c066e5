"""The trained weights of a layer, and what is not kept where some are frozen.

A product whose weight is frozen does not keep its input, and a layer below everything that is trained keeps nothing. An
adapter (LoRA) reads the input of its weight, which is kept for it as for the weight; with dropout the input without the
dropped features is made again in the backward. The router's adapter computes in float32, and keeps its input so.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_deepseek.model.architecture.adapters import LoraSettings, is_adapted
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.freezing import is_frozen
from megatron_deepseek.model.architecture.parameters import EMBEDDING, Parameter, layer_rows
from megatron_deepseek.planning.layer_shapes import LAYERNORM, UP_PROJECTION, Kept
from megatron_deepseek.settings import Settings

_ATTENTION, _MLP, _SHARED, _EXPERTS = "self_attn.", "mlp.", "mlp.shared_experts.", "mlp.experts."
GATE_AND_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", f"{_SHARED}gate_proj.weight", f"{_SHARED}up_proj.weight")
DOWN = ("mlp.down_proj.weight", f"{_SHARED}down_proj.weight")
ROUTER, EXPERTS_UP, EXPERTS_DOWN = "mlp.gate.weight", f"{_EXPERTS}gate_up_proj", f"{_EXPERTS}down_proj"
JOIN = "eh_proj.weight"
QUERY = tuple(f"{_ATTENTION}{name}.weight" for name in ("q_b_proj", "q_proj"))
VALUE, OUTPUT = f"{_ATTENTION}kv_b_proj.weight", f"{_ATTENTION}o_proj.weight"
ENTRY = tuple(f"{_ATTENTION}{name}.weight"
              for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_proj", "k_proj", "v_proj"))

# For which weights' gradients alone an input is kept. Without shared experts the router keeps its input by itself.
INPUTS_OF = {
    "attention's input": ENTRY, "gathered latents": (*QUERY, VALUE), "normed query latent": QUERY,
    "normed key-value latent": (VALUE,), "MLP's input": GATE_AND_UP, "MLP: hidden": DOWN, "router's input": (ROUTER,),
    "experts' rows": (EXPERTS_UP,), "experts: hidden": (EXPERTS_DOWN,), "MTP's joined input": (JOIN,),
}
_OF_ROUTERS = ("router's scores", "chosen experts", "routing weights before they are normalised", "sums of scores",
               "which tokens are routed", "balance factors")
_OUTPUT = f"{_ATTENTION}o_proj."
_PROJECTED = ("gathered latents", "normed query latent", "normed key-value latent")  # heads are made again of these
_BEFORE_MLP = "input of the MLP's norm"


@dataclass(frozen=True)
class Trained:
    """The weights of a layer that are trained, by their names in it, `all` of them or `weights`; those with an adapter;
    and whether what enters the layer has a gradient, the rows of the vocabulary of MTP (`embedding`) apart. `drops`:
    adapters, of `rank`, drop features of their inputs. `read`: what the last layer gives to the head is kept for it.
    """

    all: bool = True
    weights: frozenset[str] = frozenset()
    adapted: frozenset[str] = frozenset()
    entered: bool = True
    embedding: bool = True
    drops: bool = False
    rank: int = 0
    read: bool = True

    def gradients_of(self, *names: str) -> bool:
        """Return whether one of these weights, or its adapter, has a gradient."""
        return self.all or any(name in self.weights or name in self.adapted for name in names)

    def adapts(self, *names: str) -> bool:
        """Return whether one of these weights has an adapter."""
        return not self.adapted.isdisjoint(names)

    def any_of(self, prefix: str) -> bool:
        """Return whether a weight whose name begins so, or its adapter, has a gradient."""
        return self.all or any(name.startswith(prefix) for name in (*self.weights, *self.adapted))

    @property
    def attends(self) -> bool:
        """Return whether what attention is computed of has a gradient."""
        return self.entered or self.any_of("input_layernorm") or self.all or any(
            name.startswith(_ATTENTION) and not name.startswith(_OUTPUT) for name in (*self.weights, *self.adapted))

    @property
    def enters_mlp(self) -> bool:
        """Return whether what enters the MLP, or the experts, has a gradient."""
        return self.attends or any(self.any_of(name) for name in (
            _OUTPUT, JOIN, "hnorm", "enorm", "post_attention_layernorm"))

    @property
    def runs_back(self) -> bool:
        """Return whether the layer has a backward at all."""
        return self.all or self.entered or bool(self.weights or self.adapted)


ALL = Trained()


def trained_weights(settings: Settings, index: int) -> Trained:
    """Return what is trained of layer `index`, ids from num_hidden_layers on being MTP modules."""
    if settings.lora is None and not settings.run.freeze_parameters:
        return ALL
    return _trained(settings.model, index, settings.lora, tuple(settings.run.freeze_parameters))


@lru_cache(4096)
def _trained(model: ModelConfig, index: int, lora: LoraSettings | None, frozen: tuple[str, ...]) -> Trained:
    names = {row.name.removeprefix(f"model.layers.{index}."): row for row in layer_rows(model, index) if row.trained}
    embedding = lora is None and not is_frozen(EMBEDDING, frozen)
    entered = embedding or any(_has_gradient(model, row, lora, frozen) for before in range(index)
                               for row in layer_rows(model, before) if row.trained)
    found = frozenset(name for name, row in names.items() if _has_gradient(model, row, lora, frozen))
    if lora is not None:
        return Trained(False, frozenset(), found, entered, embedding, lora.lora_dropout > 0, lora.lora_rank)
    return ALL if len(found) == len(names) and entered and embedding else Trained(False, found, frozenset(), entered,
                                                                                  embedding)


def _has_gradient(model: ModelConfig, row: Parameter, lora: LoraSettings | None, frozen: tuple[str, ...]) -> bool:
    return is_adapted(model, row, lora) if lora is not None else not is_frozen(row.name, frozen)


def kept_where(trained: Trained, kept: Iterable[Kept], wide: float) -> tuple[Kept, ...]:
    """Return what is left of `kept`, which is what a layer keeps whose weights are all trained. `wide`: the bytes of
    the router's input in float32.
    """
    kept = tuple(kept)
    if trained == ALL:
        return kept
    return tuple(_kept(trained, kept, wide))


def _kept(trained: Trained, kept: tuple[Kept, ...], wide: float) -> Iterator[Kept]:
    names, attention = {each.name for each in kept}, True
    needed = _needed(trained)
    for each in kept:
        name = each.name
        attention = attention and name != _BEFORE_MLP
        if name in INPUTS_OF:
            stays = any(trained.gradients_of(reader) for reader in _readers(name, names) if reader != ROUTER) or (
                ROUTER in _readers(name, names) and (trained.all or ROUTER in trained.weights))
        elif name == "attention's output" and "attention's output as computed" in names:
            stays = trained.gradients_of(OUTPUT)
        elif name == "attention's output":
            stays = trained.attends or trained.gradients_of(OUTPUT)
        else:
            stays = needed.get(name, needed["attention" if attention else "experts and MLP"])
        if stays:
            yield each
        elif name in _PROJECTED and trained.attends and each.for_again is None and (
                name == _PROJECTED[0] or _PROJECTED[0] not in names):
            yield replace(each, for_again=UP_PROJECTION)
        elif name == _BEFORE_MLP and trained.any_of(_MLP) or name == "input of the layer" and (
                trained.any_of(_ATTENTION)):  # the norm's output is made again of it
            yield replace(each, for_again=LAYERNORM)
        if name == "router's scores" and trained.adapts(ROUTER):
            yield Kept("router's input in float32", wide)


def _readers(name: str, names: set[str]) -> tuple[str, ...]:
    """Return the weights for whose gradients an input is kept. With shared experts a router reads theirs."""
    shares = name == "MLP's input" and "router's input" not in names and "router's scores" in names
    return (*INPUTS_OF[name], ROUTER) if shares else INPUTS_OF[name]


def _needed(trained: Trained) -> dict[str, bool]:
    """Return whether what backwards read beside weights is kept, by name: where what it was made of has a gradient."""
    normed = trained.entered or trained.any_of("input_layernorm")
    normed_again = trained.enters_mlp
    found = {"input of the layer": normed, "attention's norm: statistics": normed,
             "MTP's embedding": trained.embedding or trained.any_of("enorm"),
             "MTP: embedding's norm: statistics": trained.embedding or trained.any_of("enorm"),
             _BEFORE_MLP: normed_again, "MLP's norm: statistics": normed_again,
             "MLP: gate and up": normed_again or trained.gradients_of(*GATE_AND_UP),
             "experts: gate and up": normed_again or trained.gradients_of(EXPERTS_UP),
             **dict.fromkeys(_OF_ROUTERS, normed_again or trained.gradients_of(ROUTER)),
             "MTP's output": trained.read, "attention": trained.attends,
             "experts and MLP": normed_again or trained.any_of(_MLP)}
    for latent, norm, products in (("key-value", "kv_a_layernorm", ("kv_a_proj_with_mqa.weight",)),
                                   ("query", "q_a_layernorm", ("q_a_proj.weight",))):
        made = normed or trained.gradients_of(*(f"{_ATTENTION}{name}" for name in products))
        stays = made or trained.any_of(f"{_ATTENTION}{norm}")
        found |= {f"{latent} latent": stays, f"{latent} norm: statistics": stays}
    return found
