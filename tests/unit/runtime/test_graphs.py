"""The line about compilation: new graphs alone, once."""

from megatron_deepseek.runtime import graphs
from megatron_deepseek.runtime.graphs import GraphWatch


def test_new_graphs_are_told_once(monkeypatch):
    so_far = [(3, 1.0), (3, 1.0), (14, 24.44), (14, 24.44), (15, 25.0)]
    monkeypatch.setattr(graphs, "compiled_so_far", lambda: so_far.pop(0))
    watch = GraphWatch()
    assert [watch.see() for _ in range(4)] == [None, "compiled 11 graphs in 23.4 s", None, "compiled 1 graph in 0.6 s"]
