"""The time of one call, and the rows of the table.

On CUDA: events around each call, after a write of more than the L2 cache holds, so that inputs come from memory and the
launch is hidden behind that write; the median of many. On a CPU only the script itself is tried: the best of two.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch

FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Row:
    """`rate` is GB/s where bytes are counted, TFLOP/s where operations are; `share` is of the measured ceiling.

    `error` is the distance from the first implementation's result, relative to it; `problem` says why there is no time.
    """

    piece: str
    case: str
    backend: str
    microseconds: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    error: float | None = None
    problem: str = ""
    more: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """This device's measured rates a second: bytes read and written by a copy, operations of a BF16 GEMM."""

    copy_bytes: float
    bf16_flops: float


@dataclass(frozen=True)
class Case:
    """One operation. `calls` are its implementations by name; the others are compared with the first.

    Either its bytes or its flops are counted. `on_a_gpu` names those that other devices have no kernel for.
    """

    name: str
    calls: dict[str, Callable]
    bytes: float = 0
    flops: float = 0
    on_a_gpu: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """Measures one piece of the benchmark on a device; `ceilings` are known once they are measured."""

    piece: str
    device: torch.device
    small: bool
    ceilings: Ceilings | None = None

    def seconds(self, call: Callable, repeats: int = 50) -> float:
        """Return the seconds of a call: on CUDA the median of `repeats` after ten calls to warm up."""
        if self.device.type != "cuda":
            return min(_wall(call) for _ in range(2))
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        for _ in range(10):
            call()
        spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in spans:
            flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in spans) / 1e3

    def rows(self, case: Case) -> Iterator[Row]:
        """Yield a row for each implementation. One that fails gets a row with its error, and the others go on; one for
        GPUs alone is left out elsewhere, and its row says so.
        """
        reference = None
        for backend, call in case.calls.items():
            if backend in case.on_a_gpu and self.device.type != "cuda":
                yield Row(self.piece, case.name, backend, more={"left_out": f"no kernel for {self.device.type}"})
                continue
            try:
                result = _tensors(call())
                reference = result if reference is None else reference
                seconds = self.seconds(call)
                yield self.row(case, backend, seconds, _distance(result, reference))
            except Exception as problem:  # whatever it is, the table is to go on
                yield Row(self.piece, case.name, backend, problem=first_line(problem))

    def row(self, case: Case, backend: str, seconds: float, error: float | None = None, **more) -> Row:
        rate = (case.bytes or case.flops) / seconds
        ceiling = self.ceilings and (self.ceilings.copy_bytes if case.bytes else self.ceilings.bf16_flops)
        unit, scale = ("GB/s", 1e9) if case.bytes else ("TFLOP/s", 1e12)
        return Row(self.piece, case.name, backend, seconds * 1e6, rate / scale, unit,
                   rate / ceiling if ceiling else None, error, more=more)


def _wall(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [x for x in result or () if isinstance(x, torch.Tensor)]


def _distance(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float | None:
    """Return the distance of the first results, None unless their shapes agree; codes of E4M3 count as numbers."""
    if not got or not expected or got[0].shape != expected[0].shape:
        return None
    a, b = got[0].double(), expected[0].double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:120]}"


def as_json(row: Row) -> dict:
    return {key: value for key, value in asdict(row).items() if value not in (None, "", {})}
