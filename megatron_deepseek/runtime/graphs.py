"""What --compile takes: how many graphs torch.compile has made on this rank, and how long that took."""

from megatron_deepseek.torch_private import compiled_so_far


class GraphWatch:
    """Tells of graphs that are new since it was last asked: those of the first step, and of the first evaluation."""

    def __init__(self):
        self.graphs, self.seconds = compiled_so_far()

    def see(self) -> str | None:
        """Return a line about the graphs that are new, None if there are none."""
        before, seconds = self.graphs, self.seconds
        self.graphs, self.seconds = compiled_so_far()
        new, took = self.graphs - before, self.seconds - seconds
        return f"compiled {new} graph{'s' * (new > 1)} in {took:.1f} s" if new else None
