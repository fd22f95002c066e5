"""Mistakes in how checkpoints of others are read, and in what a run shows. A table like table.py's."""

from mutant import of

CONVERTED = of(
    ("tests/unit/checkpoint/convert/test_convert_legacy.py",),
    ("joining._items", "[half * own[0] // halves, *", "[half * rows, *"),
    ("joining._items", "begin[axis] += rank * (local[axis] // halves)", "begin[axis] += rank * local[axis]"),
    ("joining._stages", "ranks * len(iteration.files[0].chunks)", "len(iteration.files[0].chunks)"),
    ("joining._stages", "file.pipeline != stage % ranks", "file.pipeline != stage // len(iteration.files[0].chunks)"),
    ("joining._part", "file.expert * local + number", "number"),
    ("transposed_experts", "run if row else 0", "0"),
    ("_grouped_items", "number * prod(size)", "0"),
    ("StackedSource.read", "part.T.contiguous()", "part.reshape(part.T.shape)"),
    ("torch_file._begin", "sum(lengths)", "0"),
    ("torch_file._known", "(module, name) in _CALLS", "module == \"torch.nn\""),
) + of(
    ("tests/unit/runtime/test_expert_load.py",),
    ("ExpertLoad.violation", "len(counts) / sum(counts)", "1 / sum(counts)"),
    ("ExpertCounter.after_step", "self._steps, self._counts = self._steps, self._counts, 0, {}",
     "self._steps, self._counts = self._steps, self._counts, 0, self._counts"),
    ("ExpertLoadKeeper._past", "cut_after(path, self._resumed)", "pass"),
    ("ExpertLoadKeeper.close", "self._draw()", "pass"),
) + of(
    ("tests/e2e/test_pretrain.py",),
    ("ExpertCounter._gathered", "for part in gathered", "for part in gathered[:1]"),
) + of(
    ("tests/unit/runtime/test_open_metrics.py",),
    ("OpenMetricsFile.step", "self._tokens += metrics.tokens", "self._tokens = metrics.tokens"),
    ("open_metrics.render", "# EOF", "# END"),
    ("OpenMetricsFile._write", "os.replace(partial, self._path)", "self._path.write_text(partial.read_text())"),
) + of(
    ("tests/unit/runtime/test_manifest.py",),
    ("rerun.command_line", "shlex.join(words)", "' '.join(words)"),
    ("manifest.launcher", "words[-len(sys.argv):] == sys.argv", "True"),
    ("manifest.add_start", "[*starts, start]", "[start]"),
)
