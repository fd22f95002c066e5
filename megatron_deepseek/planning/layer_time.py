"""How long one layer takes for one micro-batch on a rank: its computing, and what travels, forwards and backwards.

Computing is the products, attention's core, and passes over memory (efficiency.py). What travels to experts and back
is by itself, since schedules can hide it; what tensor and context ranks exchange stands in the way of the layer.
"""

from dataclasses import dataclass, fields
from functools import lru_cache

from megatron_deepseek.planning.activations import layer, mtp, total
from megatron_deepseek.planning.attention_activations import travelling_width
from megatron_deepseek.planning.efficiency import PASSES_BACKWARD, PASSES_FORWARD, Rates
from megatron_deepseek.planning.flops import attention_core_flops
from megatron_deepseek.planning.layer_bytes import LayerMode, layer_bytes
from megatron_deepseek.planning.layer_shapes import EXPERT_ACTIVATION, LAYERNORM, UP_PROJECTION, LayerShapes
from megatron_deepseek.planning.network import Network
from megatron_deepseek.planning.products import Product, layer_products


@dataclass(frozen=True)
class Seconds:
    """Seconds of one micro-batch on a layer or a stage.

    Computing: `forward`; `inputs` and `weights` of the backward, with what is computed again in `inputs`. `sent` to
    experts and back in the forward, `returned` in the backward; `beside_*`: computing of shared experts, beside which
    tokens can travel. `apart_*`: what nothing is done beside: tensor and context ranks' exchanges, copies to the host.
    """

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    sent: float = 0.0
    returned: float = 0.0
    beside_forward: float = 0.0
    beside_backward: float = 0.0
    apart_forward: float = 0.0
    apart_backward: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, name) + getattr(other, name) for name in _NAMES))


_NAMES = tuple(field.name for field in fields(Seconds))


@dataclass(frozen=True)
class Machine:
    """What runs: the speeds of its GPUs and of their network, and how dispatch uses it: this project's by its name, of
    which `grouped` has levels that take turns; or with `levels_at_once` always one like DeepEP or HybridEP, which
    sends a token once to each node and fans it out meanwhile.
    """

    rates: Rates
    network: Network
    cp_ring: bool = True
    levels_at_once: bool = False


@lru_cache(8192)
def layer_seconds(machine: Machine, shapes: LayerShapes, index: int, mode: LayerMode) -> Seconds:
    """Return the seconds of layer `index` run in `mode`; ids from num_hidden_layers on are MTP modules."""
    rates, element = machine.rates, shapes.numbers.element
    products = tuple(layer_products(shapes, index))
    gemms = sum(rates.product(each, element) for each in products)
    tensors = tuple(_kept(shapes, index))
    core = shapes.whole * attention_core_flops(shapes.model, shapes.length) / shapes.layout.tp / 2  # causal: half
    pass_over = rates.memory(total(tensors))
    forward = gemms + rates.attention(core, False) + PASSES_FORWARD * pass_over
    inputs = gemms + rates.attention(core, True) + PASSES_BACKWARD * pass_over
    sent = _exchange(machine, shapes, index)
    shared = _shared(rates, shapes, index)
    apart = _collectives(machine, shapes, index)
    again, travels = _made_again(machine, shapes, index, mode, forward, products)
    host = rates.host(layer_bytes(shapes, index, mode).host) if mode.offloaded else 0.0
    return Seconds(forward, inputs + again, gemms, sent, sent + travels * sent, shared, 2 * shared, apart + host,
                   apart * (1 + travels) + host)


def _kept(shapes: LayerShapes, index: int):
    depth = index - shapes.model.num_hidden_layers
    return layer(shapes, index) if depth < 0 else mtp(shapes, depth)


def _made_again(machine: Machine, shapes: LayerShapes, index: int, mode: LayerMode, forward: float,
                products: tuple[Product, ...]) -> tuple[float, bool]:
    """Return the seconds that a backward computes again, and whether tokens travel again too."""
    if mode.full:
        return forward, True
    names = frozenset(mode.again) & {LAYERNORM, EXPERT_ACTIVATION, UP_PROJECTION}
    if not names:
        return 0.0, False
    remade = sum(each.bytes for each in _kept(shapes, index) if each.again in names)
    multiplied = sum(machine.rates.product(each, shapes.numbers.element) for each in products if each.again in names)
    return multiplied + machine.rates.memory(2 * remade), False


def _shared(rates: Rates, shapes: LayerShapes, index: int) -> float:
    """Return the forward seconds of a layer's shared experts."""
    if not shapes.model.is_moe_layer(index):
        return 0.0
    width = shapes.model.n_shared_experts * shapes.model.moe_intermediate_size // shapes.layout.tp
    hidden, fp8 = shapes.model.hidden_size, shapes.numbers.fp8
    parts = (Product(shapes.whole, width, hidden, fp8=fp8),) * 2 + (Product(shapes.whole, hidden, width, fp8=fp8),)
    return sum(rates.product(each, shapes.numbers.element) for each in parts) if width else 0.0


def _exchange(machine: Machine, shapes: LayerShapes, index: int) -> float:
    """Return the seconds in which tokens go to their experts and come back, once forwards; as many backwards.

    One way is in the form of products' inputs (FP8 in the FP8 recipe), the other in the layers' dtype.
    """
    model, layout, traffic = shapes.model, shapes.layout, shapes.traffic
    if not model.is_moe_layer(index) or layout.ep * layout.etp == 1:
        return 0.0
    network, numbers = machine.network, shapes.numbers
    width = numbers.product_input(1, model.hidden_size) + numbers.plain(1, model.hidden_size)
    slices = 2 * network.gather(numbers.plain(shapes.expert_rows, model.hidden_size), layout.etp, 1)
    if layout.ep == 1:
        return slices
    if traffic.dispatcher == "allgather":
        return slices + 2 * network.gather(numbers.plain(shapes.own * layout.ep, model.hidden_size), layout.ep,
                                           layout.etp)
    nodes = network.nodes(layout.ep, layout.etp)
    near = network.neighbours(layout.ep, layout.etp)
    copies = shapes.own * model.num_experts_per_tok * traffic.imbalance
    if traffic.dispatcher == "grouped" or machine.levels_at_once:
        across = shapes.own * traffic.nodes * traffic.imbalance * (1 - 1 / nodes)
        inside = copies * (1 - 1 / near)
        return slices + _ways(network, width * inside, width * across, not machine.levels_at_once)
    across, inside = copies * (1 - 1 / nodes), copies / nodes * (1 - 1 / near)
    return slices + _ways(network, width * inside, width * across, False)


def _ways(network: Network, inside: float, across: float, in_turn: bool) -> float:
    """Return the seconds there and back; `inside` and `across` are the bytes of both ways."""
    return 2 * network.all_to_all(inside / 2, across / 2, in_turn)


def _collectives(machine: Machine, shapes: LayerShapes, index: int) -> float:
    """Return the seconds of what tensor and context ranks exchange in a forward."""
    model, layout, network, numbers = shapes.model, shapes.layout, machine.network, shapes.numbers
    hidden = numbers.plain(shapes.whole, model.hidden_size)
    travelling = travelling_width(model, shapes.kv_heads)
    seconds = 0.0
    if layout.tp > 1:
        query = model.q_lora_rank or model.hidden_size
        latents = numbers.plain(shapes.whole, model.hidden_size if model.grouped_query else query + travelling)
        dense = not model.is_moe_layer(index) or model.n_shared_experts > 0
        gathers = [latents, hidden] + [hidden, hidden] * dense
        times = 1 if layout.sequence_parallel else 2  # an all-reduce is two of them, of the outputs alone
        used = gathers if layout.sequence_parallel else [hidden] * (1 + dense)
        seconds += times * sum(network.gather(each, layout.tp, 1) for each in used)
    if layout.cp > 1:
        whole = numbers.plain(shapes.whole * layout.cp, travelling)
        if model.grouped_query:
            travels = network.gather(whole, layout.cp, layout.tp)
        else:  # each TP rank sends a slice of the latents, and slices are gathered where they arrive
            arrived = whole * (layout.cp - 1) / layout.cp
            travels = network.gather(whole / layout.tp, layout.cp, layout.tp) + network.gather(arrived, layout.tp, 1)
        core = shapes.whole * attention_core_flops(model, shapes.length) / layout.tp / 2
        seconds += max(0.0, travels - machine.rates.attention(core, False)) if machine.cp_ring else travels
    return seconds
