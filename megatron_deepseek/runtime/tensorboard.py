"""The curves and pictures of a run for TensorBoard."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_deepseek.packages import how_to_install
from megatron_deepseek.runtime.appending import AppendedFile
from megatron_deepseek.runtime.expert_load import ExpertLoad
from megatron_deepseek.runtime.megatron_curves import Curves
from megatron_deepseek.runtime.metrics import StepMetrics
from megatron_deepseek.runtime.scalars import scalars

_QUEUE_SECONDS = 120.0  # as torch's SummaryWriter


class TensorBoard:
    """A listener that writes scalars for TensorBoard.

    A resume writes a SessionLog.START event, by which TensorBoard hides older events of the repeated steps. The events
    are TensorBoard's, the file is ours: its own writer loses what a full disk refuses, and ends the run. Up to
    `queue_size` events wait in memory, where a kill loses them, for two minutes at most.
    """

    def __init__(self, directory: Path, resumed_iteration: int, tell: Callable[[str], None], queue_size: int = 1):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ValueError(f"--tensorboard-dir {directory} needs the package tensorboard ({error}): "
                              f"{how_to_install('tensorboard')}") from error
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._events, self._summaries = event_pb2, summary_pb2
        self._file = AppendedFile(directory / name, tell)
        self._records = RecordWriter(self._file)
        self._queue: list[bytes] = []
        self._queue_size, self._written_at, self._consumed_samples = queue_size, time.monotonic(), 0
        self._event(resumed_iteration + 1, file_version="brain.Event:2")
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._event(resumed_iteration + 1, session_log=begin)

    def _event(self, step: int, **content) -> None:
        event = self._events.Event(wall_time=time.time(), step=step, **content)
        self._queue.append(event.SerializeToString())
        if len(self._queue) >= self._queue_size or time.monotonic() - self._written_at > _QUEUE_SECONDS:
            self._write_queue()

    def _write_queue(self) -> None:
        for event in self._queue:
            self._records.write(event)
        self._queue, self._written_at = [], time.monotonic()

    def step(self, metrics: StepMetrics) -> None:
        self._scalars("train", metrics.iteration, metrics.record())

    def validation(self, iteration: int, lm_loss: float, mtp_loss: tuple[float, ...],
                   source_loss: dict[str, float] | None, mtp_acceptance: tuple[float, ...]) -> None:
        self._scalars("validation", iteration, {"lm_loss": lm_loss, "mtp_loss": mtp_loss, "source_loss": source_loss,
                                                "mtp_acceptance": mtp_acceptance})

    def held_out(self, iteration: int, name: str, results: dict[str, Any]) -> None:
        self._scalars(f"held out/{name}", iteration, results)

    def curves(self, iteration: int, curves: Curves) -> None:
        if curves.consumed_samples is not None:
            self._consumed_samples = curves.consumed_samples
        for name, value in (curves.by_samples | curves.others).items():
            self._scalar(name, iteration, value)
        for name, value in curves.by_samples.items():
            self._scalar(f"{name} vs samples", self._consumed_samples, value)

    def _scalars(self, group: str, iteration: int, values: dict) -> None:
        for name, value in scalars(group, values):
            self._scalar(name, iteration, value)

    def _scalar(self, name: str, step: int, value: float) -> None:
        scalar = self._summaries.Summary.Value(tag=name, simple_value=value)
        self._event(step, summary=self._summaries.Summary(value=[scalar]))

    def expert_load(self, load: ExpertLoad) -> None:
        self._scalars("experts", load.iteration, {"max_violation": load.max_violation})

    def picture(self, iteration: int, tag: str, png: bytes) -> None:
        width, height = (int.from_bytes(png[at:at + 4], "big") for at in (16, 20))  # of the header, which comes first
        image = self._summaries.Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        value = self._summaries.Summary.Value(tag=tag, image=image)
        self._event(iteration, summary=self._summaries.Summary(value=[value]))

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._write_queue()
        self._file.close()
