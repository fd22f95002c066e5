"""Work beside other work: who waits for whom, told by stand-ins for CUDA's streams, since there is no GPU here."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from small_models import V3_SMALL, forward, random_batch, whole_model

from megatron_deepseek.model.moe import MoE
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled
from megatron_deepseek.ops.fp8.encoding import quantize_1x128
from megatron_deepseek.ops.side_stream import RunInLine, RunOnSideStream


class Stream:
    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Tensor:
    requires_grad = False

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def record_stream(self, stream: Stream) -> None:
        self.log.append(f"{self.name} is used on {stream.name}")


def test_side_stream_waits_for_its_input_and_is_waited_for(monkeypatch):
    log: list[str] = []
    main, side = Stream("main", log), Stream("side", log)

    @contextmanager
    def on(stream):
        log.append(f"on {stream.name}:")
        yield
        log.append("back on main:")

    def work(x):
        log.append("work")
        return Tensor("y", log)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    beside = RunOnSideStream(side)
    beside.start(work, Tensor("x", log))
    log.append("dispatch")
    assert beside.result().name == "y"
    assert log == ["side waits for main", "x is used on side", "on side:", "work", "back on main:", "dispatch",
                   "main waits for side", "y is used on main"]


def test_every_part_of_a_block_scaled_input_is_known_to_be_used_there(monkeypatch):
    side, used = Stream("side", []), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main", []))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda part, stream: used.append((part, stream)))
    x = torch.randn(2, 128)
    scaled = BlockScaled(*quantize_1x128(x), x.dtype, whole=x)
    RunOnSideStream(side).start(lambda _: Tensor("y", []), scaled)
    assert all(part is found and stream is side
               for part, (found, stream) in zip((scaled.q, scaled.scale, x), used, strict=True))


def test_a_backward_waits_for_sums_of_weights_gradients(monkeypatch):
    """They are added on the side stream, which FSDP does not know, in the second micro-batch: `x`'s gradient, and so
    whatever FSDP does once it is there, comes after a wait for them.
    """
    log: list[str] = []
    main, side = Stream("main", log), Stream("side", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda part, stream: None)
    weight = torch.ones(3, requires_grad=True)
    weight.register_post_accumulate_grad_hook(lambda _: log.append("sum of the weight's gradients"))
    for _ in range(2):
        x = torch.randn(3, requires_grad=True)
        x.register_hook(lambda _: log.append("gradient of x"))
        beside = RunOnSideStream(side)
        beside.start(lambda x: (x * weight).sum(), x)
        result = beside.result()
        log.clear()
        result.backward()
        assert log == ["sum of the weight's gradients", "main waits for side", "gradient of x"]


def test_without_streams_it_is_a_call():
    beside = RunInLine()
    beside.start(lambda x: 2 * x, 21)
    assert beside.result() == 42


class Noted(RunInLine):
    """Records when work is begun and when its result is used."""

    def __init__(self, log: list[str]):
        self.log = log

    def start(self, function, x):
        self.log.append("shared experts begin")
        super().start(function, x)

    def result(self):
        self.log.append("their result is used")
        return super().result()


class NotedDispatcher:
    """Records when counts begin their way to the host, when the host waits for them, and when tokens are sent."""

    def __init__(self, dispatcher, log: list[str]):
        self.dispatcher, self.log = dispatcher, log

    def route(self, experts_TK):
        self.log.append("counts are asked for")
        route = self.dispatcher.route(experts_TK)
        return replace(route, read=lambda: self.log.append("counts are waited for") or route.read())

    def __call__(self, *args):
        self.log.append("dispatch")
        return self.dispatcher(*args)


def test_shared_experts_begin_while_counts_are_on_their_way_and_are_waited_for_after_dispatch(meshes):
    model, log = whole_model(V3_SMALL, meshes, 6), []
    (moe,) = (module for module in model.modules() if isinstance(module, MoE))
    moe.side_stream, moe.dispatcher = lambda: Noted(log), NotedDispatcher(moe.dispatcher, log)
    forward(model, *random_batch(V3_SMALL, 2, 6))
    assert log == ["counts are asked for", "shared experts begin", "dispatch", "counts are waited for",
                   "their result is used"]
