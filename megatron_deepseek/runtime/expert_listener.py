"""What a run keeps and shows of its experts' load: expert_load.jsonl and .png in --save, images of loggers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_deepseek.runtime.expert_load import FILE, ExpertLoad, LoadHistory, read_history, to_record
from megatron_deepseek.runtime.expert_picture import draw_load
from megatron_deepseek.runtime.metrics import MetricsFile, StepMetrics, cut_after, replace_content

PICTURE, TAG = "expert_load.png", "experts/load"
_FIRST, _LONGEST = 20, 1000  # iterations to the first picture, and at most between two


class Gallery(Protocol):
    """A logger of curves that takes pictures too."""

    def picture(self, iteration: int, tag: str, png: bytes) -> None: ...


class ExpertLoadKeeper:
    """Keeps the load of each report; draws it at iteration 20, then each time a run has become twice as long, every
    1,000 iterations at the latest, and at its end. A picture takes a second or two, in which training waits.

    `save` is None where only loggers want pictures. A resumed run's curve begins where its file does.
    """

    def __init__(self, save: Path | None, resumed_iteration: int, galleries: Sequence[Gallery],
                 tell: Callable[[str], None]):
        self._save, self._galleries, self._tell = save, galleries, tell
        self._resumed, self._drawn = resumed_iteration, resumed_iteration
        self._file: MetricsFile | None = None
        self._history = LoadHistory([], None) if save is None else self._past(save / FILE)
        self._waiting, self._warned = False, False

    def _past(self, path: Path) -> LoadHistory:
        """Return what the file says of the iterations before this start, others are removed from it."""
        try:
            cut_after(path, self._resumed)
            return read_history(path) if path.exists() else LoadHistory([], None)
        except ValueError as error:
            self._tell(f"{error}; its curve begins anew")
            return LoadHistory([], None)

    def step(self, metrics: StepMetrics) -> None:
        pass

    def validation(self, *results: Any) -> None:
        pass

    def held_out(self, *results: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def expert_load(self, load: ExpertLoad) -> None:
        due = load.iteration >= min(max(_FIRST, 2 * self._drawn), self._drawn + _LONGEST)
        self._history, self._waiting = self._history.after(load), True
        self._keep(load, due)
        if due:
            self._draw()

    def _keep(self, load: ExpertLoad, with_counts: bool) -> None:
        """Add a line to the file, which dense models have none of; if it cannot be made now, the next line tries again.
        """
        if self._file is None and self._save is not None:
            try:
                self._file = MetricsFile(self._save / FILE, self._resumed, self._tell)
            except OSError as error:
                self._warn(f"{self._save / FILE} cannot be made: {error.strerror}")
        if self._file is not None:
            self._file.append(to_record(load, with_counts))

    def _warn(self, text: str) -> None:
        """Tell what is missing of what is shown, the first time alone."""
        if not self._warned:
            self._tell(f"{text}. Training goes on")
        self._warned = True

    def _draw(self) -> None:
        """Draw what is known; a machine without matplotlib, or with a full disk, trains on."""
        last = self._history.last
        self._drawn, self._waiting = last.iteration, False
        try:
            png = draw_load({"": self._history})
            if self._save is not None:
                replace_content(self._save / PICTURE, png)
        except (ImportError, OSError) as error:
            return self._warn(f"{PICTURE} is not drawn: {error}")
        for gallery in self._galleries:
            gallery.picture(last.iteration, TAG, png)

    def close(self) -> None:
        """Draw what has come since the last picture, if the run was long enough for one."""
        if self._waiting and self._history.last.iteration >= _FIRST:
            self._keep(self._history.last, with_counts=True)
            self._draw()
        if self._file is not None:
            self._file.close()
