"""Functions of tensors as graphs of torch.compile: what a layer computes between its GEMMs, attention and collectives.

Such a function is pure: it has no parameters of its own, starts no collective and reads nothing on the host. So graphs
depend on shapes and dtypes alone. Whatever gathers weights (FSDP), defers their gradients (zero-bubble), divides tokens
(TP, EP, CP) or recomputes layers stays outside of them, as it is without compilation.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_deepseek.torch_private import compile_one_graph, mark_dynamic


@dataclass(frozen=True)
class Fusible:
    """A function that may be one graph.

    `tokens` are pairs (argument, dimension) whose size is a number of tokens, which differs from call to call. With
    fewer than `least` tokens the function runs as it is: a graph is specialised to a size of 0 or 1, and where numbers
    of tokens vary, those of experts or of parts of documents, it would be made in the middle of a run. `form`: the same
    function in a form that a compiler takes, or makes fewer passes of; None for the function itself.
    """

    function: Callable
    tokens: tuple[tuple[int, int], ...]
    least: int = 1
    form: Callable | None = None


class Graph:
    """A Fusible as graphs, each made at the first call with its kind of arguments: dtypes, widths, gradients or not."""

    def __init__(self, fusible: Fusible, backend: str):
        self.function, self.tokens, self.least = fusible.function, fusible.tokens, fusible.least
        self._compiled = compile_one_graph(fusible.form or fusible.function, backend)

    def __call__(self, *args):
        position, dimension = self.tokens[0]
        number = args[position].shape[dimension]
        if number < self.least:
            return self.function(*args)
        if number > 1:
            for position, dimension in self.tokens:
                if position < len(args) and args[position] is not None:
                    mark_dynamic(args[position], dimension % args[position].ndim)
        return self._compiled(*args)


class Graphs:
    """Gives each of the `fusibles` functions its graph, the same to all layers, and other functions unchanged."""

    def __init__(self, fusibles: Iterable[Fusible], backend: str):
        self._graphs = {each.function: Graph(each, backend) for each in fusibles}

    def __call__(self, function: Callable) -> Callable:
        return self._graphs.get(function, function)
