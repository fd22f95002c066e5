"""Mistakes of dry runs: of what is counted, of the tokens that experts get, and of how many micro-batches are made."""

from mutant import of

UNIT = "tests/unit/dry_run/"
ROUTES = (f"{UNIT}test_drawn_routes.py",)
ENOUGH = (f"{UNIT}test_enough_micro_batches.py",)
STORAGES = (f"{UNIT}test_storages.py",)
JOBS = (f"{UNIT}test_dry_jobs.py",)
FREED = (f"{UNIT}test_freed_weights.py",)
COMMAND = (f"{UNIT}test_dry_run_command.py",)

DRY_RUNS = of(
    ROUTES,
    ("routing.shares", "1 / rank for rank", "1 / rank**2 for rank"),
    ("routing.divide", "room = [i for i in order if counts[i] < most][:missing]", "room = order[:missing]"),
    ("DrawnRoutes._of_nodes", "copies = [a + (nodes - 1) * b for a, b in zip(own[on_node], others[on_node])]",
     "copies = own[on_node]"),
    ("DrawnRoutes._of_nodes", "else [nodes * count for count in others[mine]]", "else others[mine]"),
) + of(
    ENOUGH,
    ("rank.enough_micro_batches", "max(3, 2 * job.layout.pp)", "max(3, job.layout.pp)"),
    ("rank.enough_micro_batches", "wanted.communication or ", ""),
    ("rank.enough_micro_batches", " or job.schedule in _ALL_AT_ONCE", ""),
) + of(
    STORAGES,
    ("StorageLog._resizing", "                self._size(found[0], storage.nbytes())", "                pass"),
    ("StorageLog._end", "allocation.outlived = True", "allocation.outlived = False"),
    ("StorageLog._freed", "            self._size(number, 0)", "            pass"),
) + of(
    JOBS,
    ("SendingStage._send", 'if self.device.type != "cuda":', "if False:"),
) + of(
    FREED,
    ("ReducingStage.backward_maybe_with_nosync", "not (last_backward or frees_after_forward(self.submod))",
     "not last_backward"),
    ("fake_tensors._copied_for_fsdp", "result.clone() if result is tensor", "result if result is tensor"),
    ("rank.batch_of", "* 2 // length", "* 0"),
) + of(
    COMMAND,
    ("label_passing", 'f"gradient of {name}"', "name"),
    ("RecordedCollectives.__torch_dispatch__", "if name not in _LOCAL:", "if name not in (*_LOCAL, 'alltoall_base_'):"),
)
