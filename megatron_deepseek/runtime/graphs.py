"""What --compile takes: how many graphs torch.compile has made on this rank, and how long that took."""

from dataclasses import dataclass

from megatron_deepseek.torch_private import compiled_so_far


@dataclass
class GraphWatch:
    """Tells of graphs that are new since it was last asked: those of the first step, and of the first evaluation."""

    graphs: int = 0
    seconds: float = 0.0

    def see(self) -> str | None:
        """Return a line about the graphs that are new, None if there are none."""
        graphs, seconds = compiled_so_far()
        new, took = graphs - self.graphs, seconds - self.seconds
        self.graphs, self.seconds = graphs, seconds
        return f"compiled {new} graphs in {took:.1f} s" if new else None
