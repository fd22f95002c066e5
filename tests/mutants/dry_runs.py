"""Mistakes of dry runs: of what is counted, of the tokens that experts get, and of how many micro-batches are made."""

from mutant import of

UNIT = "tests/unit/dry_run/"
ROUTES = (f"{UNIT}test_drawn_routes.py",)
ENOUGH = (f"{UNIT}test_enough_micro_batches.py",)
STORAGES = (f"{UNIT}test_storages.py",)
JOBS = (f"{UNIT}test_dry_jobs.py",)
EVALUATION = ("tests/unit/parallel/test_forward_only.py", f"{UNIT}test_evaluation_memory.py")
FREED = (f"{UNIT}test_freed_weights.py",)
COMMAND = (f"{UNIT}test_dry_run_command.py",)
IN_A_ROW = (f"{UNIT}test_jobs_in_a_row.py",)
PLAIN = (f"{UNIT}test_plain_experts.py",)
FP8_PEAKS = (f"{UNIT}test_fp8_peaks.py",)
FP8_BYTES = (f"{UNIT}test_fp8_attention_bytes.py",)
ENCODING = ("tests/unit/ops/fp8/test_fp8.py",)
BYTE_TAPE = ("tests/unit/planning/test_byte_tape.py",)
KNOWN = (f"{UNIT}test_known_results.py",)
REAL = ("tests/parallel/test_dry_run.py",)
STATES = ("tests/unit/planning/test_state_bytes.py",)
FORWARDS = (f"{UNIT}test_planned_forwards.py",)
COVERED = (f"{UNIT}test_covered_plans.py",)
EXCHANGES = (f"{UNIT}test_exchanges.py",)
REPLAY = ("tests/unit/planning/test_replay.py",)
REDUCTIONS = ("tests/unit/planning/test_backward_bytes.py",)
TRAINED = ("tests/unit/planning/test_trained_weights.py",)
DRAWN = (f"{UNIT}test_plans_of_drawn_layouts.py",)

DRY_RUNS = of(
    TRAINED,
    ("Trained.enters_mlp", "_OUTPUT, JOIN", "JOIN"),
    ("trained_weights._needed", "normed_again or trained.gradients_of(*GATE_AND_UP)", "normed_again"),
    ("trained_weights._readers", "(*INPUTS_OF[name], ROUTER) if shares else INPUTS_OF[name]", "INPUTS_OF[name]"),
    ("trained_weights._trained", "entered = embedding or any(", "entered = any("),
    ("trained_weights._kept", 'if name == "router\'s scores" and trained.adapts(ROUTER):', "if False:"),
    ("stage_bytes._trained_of", "replace(found, read=False) if unread else found", "found"),
    ("stage_bytes._head_reads", "chunk is not None or ", "chunk is not None and "),
    ("inner_bytes", "(routed if experts else 1)", "1"),
) + of(
    COVERED,
    ("stage_bytes._first_forward", "    if gathers_ahead(job):\n", "    if False:\n"),
    ("stage_bytes._first_forward", "units.unpacking_experts(index, again=False) + layer", "layer"),
    ("head_backward", "    if not trained:\n", "    if False:\n"),
    ("layer_moments", "(again.most, turns.back)", "(0.0, turns.back)"),
    ("attention_forward._in_blocks", "(queries + 3 * sums)", "queries"),
    ("attention_forward._in_blocks", "        there += queries + output", "        pass"),
    ("rank.batch_of", "if drops else {}", "if False else {}"),
    ("forwards", "    if weights and gathers_ahead(job):", "    if False:"),
    ("forwards", "weights.all - each.freed", "weights.all"),
    ("unsaved_bytes", "if each.name not in _RETURNED", "if True"),
    ("_bytes_of_adapters", "kept.router if row.name.endswith(ROUTER) else ", ""),
) + of(
    DRAWN,
    ("backward_bytes._added_to_embedding", "return 2 *", "return 0 *"),
    ("Gathered.unpacking_experts", "(1 + again) *", "1 *"),
    ("Gathered.at", "(self.sent[index].experts if moment.reruns else 0.0)", "0.0"),
    ("stage_bytes._first_forward", "units.outer, units.outer_sent, kept", "units.outer, 0.0, kept"),
    ("seen_by_adapters", "each.bytes * wider * readers", "each.bytes"),
    ("Numbers.made_plain", "self.element * parameters if self.making else 0.0", "0.0"),
    ("head._gradient_of_logits", "2 * shapes.whole", "0 * shapes.whole"),
    ("backward_bytes._coming", "weights.sent[upwards[0]].dense", "0.0"),
    ("activations.router", "and shapes.sequences > 1", ""),
    ("stage_bytes.beside_layers", " and not passed_on", ""),
    ("trained_weights._kept", "if name in _PROJECTED and trained.attends", "if False"),
    ("trained_weights._kept", "trained.any_of(_ATTENTION)", "False"),
    ("backward_tape._mlp", "uneven=width % TILE > 0", "uneven=False"),
    ("permute.sum_rows", "not on_accelerator(x_RH)", "True"),
    ("Gathered._comes", "bool(moment.ended) if self.routers else not moment.reruns", "True"),
    ("backward_bytes._added_to_head", "return head + layers.waits", "return 0 * layers.waits"),
) + of(
    FORWARDS,
    ("stage_forward._left_by_backwards", "return weights", "return 0.0 * weights"),
    ("forward_bytes._with_slices", "2 * numbers.plain(gathered, h) + 2 *", "numbers.plain(gathered, h) + 2 *"),
    ("forward_bytes._whole_experts", "running, run.kept + back", "running, run.kept"),
    ("forward_bytes.forward_bytes", "        before += stream", "        pass"),
) + of(
    STATES,
    ("_Ranks.missing", "-shape[0] %", "0 *"),
    ("_Ranks.missing", "* prod(shape[1:])", ""),
    ("_Ranks.missing", 'row.mesh == "expert"', "0"),
) + of(
    ROUTES,
    ("routing.shares", "1 / rank for rank", "1 / rank**2 for rank"),
    ("routing.divide", "room = [i for i in order if counts[i] < most][:missing]", "room = order[:missing]"),
    ("DrawnRoutes._of_nodes", "copies = [a + (nodes - 1) * b for a, b in zip(own[on_node], others[on_node])]",
     "copies = own[on_node]"),
    ("DrawnRoutes._of_nodes", "else [nodes * count for count in others[mine]]", "else others[mine]"),
) + of(
    ENOUGH,
    ("rank.enough_micro_batches", "number = 2 * pp + 1", "number = 2 * pp"),
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
    ("labels.label_passing", "    _label_shards(log, trainer)", "    pass"),
    ("_inputs_on_device", "kept.clone()", "kept"),
    ("host_shards._on_host", "tensor.clone() if", "tensor if"),
) + of(
    IN_A_ROW,
    ("fake_job.fake_job", "_clear_sharding_prop_cache()", "pass"),
) + of(
    PLAIN,
    ("plain_experts._dense", "out[0].copy_(weight.form.dense(weight.codes[0], weight.scales[0], dtype))", "pass"),
) + of(
    KNOWN,
    ("KnownResults.of", "if not _makes_new_tensors(operator):", "if False:"),
    ("KnownResults.of", "torch.get_default_dtype(), ", ""),
    ("known_results._key", "return type(value), value", "return value"),
    ("known_results._key", "value.shape, value.stride(), value.dtype", "value.shape, value.dtype"),
    ("known_results._are_whole", "len(storages) == len(made) and ", ""),
    ("known_results._are_whole", "not storages & of_arguments and ", ""),
    ("known_results._are_whole", "== each.untyped_storage().nbytes() for each in made", "> 0 for each in made"),
    ("known_results._form", "result.stride(), ", "torch.empty(result.shape, device='meta').stride(), "),
    ("known_results._form", "type(result)(map", "list(map"),
) + of(
    REAL,
    ("_Keeps.wait", "self._running.discard(self)", "pass"),
    ("NothingComputed.__torch_dispatch__", "return args[0]  # as", "return args[0].clone()  # as"),
    ("labels.category", "ACTIVATIONS if allocation.outlived else TEMPORARIES", "TEMPORARIES"),
) + of(
    EVALUATION,
    ("forward_order", "stage = max(", "stage = min("),
    ("ReducingStage.forward_one_chunk", "            self.fwd_cache.clear()", "            pass"),
    ("ReducingStage.finish_step", "self.fwd_cache.clear()", "pass"),
) + of(
    FREED,
    ("ReducingStage.backward_maybe_with_nosync", "not (last_backward or frees_after_forward(self.submod))",
     "not last_backward"),
    ("rank.batch_of", "* 2 // length", "* 0"),
) + of(
    COMMAND,
    ("label_passing", 'f"gradient of {name}"', "name"),
    ("command._with_base", '("--load", "any") if', "() if"),
    ("command._run", 'if distillation is not None:', "if False:"),
    ("RecordedCollectives.__torch_dispatch__", "if name not in _LOCAL:", "if name not in (*_LOCAL, 'alltoall_base_'):"),
) + of(
    FP8_PEAKS,
    ("backward_tape._down", "0.0 if frozen else tiles)", "0.0)"),
    ("kernels._gather_backward", "if slot_of_copy.shape[1] == 1:", "if False:"),
    ("attention_tape._attend", "make(padded + results", "make(results"),
    ("backward_tape._down", "(2 - as_tiles - frozen)", "(2 - frozen)"),
    ("attention_tape._blocks", "output if shapes.numbers.fp8 else 0.0", "0.0"),
    ("_layers_of_backward", "beside - held", "beside"),
    ("arrivals._in_need", 'int(schedule == "1F1B" and bool(sent or backwards))', "0"),
) + of(
    FP8_BYTES,
    ("encoding.dequantize_1x128", "if on_accelerator(q) and", "if False and"),
    ("attention._heads", "if missing else x_BSNW", "if True else x_BSNW"),
    ("_Attention.backward", "next(parts) if ctx.squares == _WHOLE else ", ""),
) + of(
    ENCODING,
    ("encoding.dequantize_1x128", "dtype.itemsize < 4", "dtype.itemsize < 9"),
) + of(
    BYTE_TAPE,
    ("Tape.is_frozen", "bool(readers) and not self._trained.gradients_of(*readers)", "False"),
    ("Tape.product", "self.make(2 * each)", "self.make(each)"),
    ("Tape.product", "and (each or not self._waits(source))", "and not self._waits(source)"),
    ("Tape.products_of_swiglu", "0.0 if self._waits(source) else count * each", "count * each"),
    ("Tape._adapter", "            self.make(size)\n        self.make(size)\n", "            self.make(size)\n"),
    ("Tape._adapter", "            if not stays:\n                self.free(source)\n", ""),
    ("Tape._adapter", "self.make(size + hashes)\n            self.drop(size + hashes)", "pass"),
    ("Tape._weigh_input", "columns += of_input", "pass"),
    ("Tape.weigh", "self.drop(rows)", "pass"),
) + of(
    EXCHANGES,
    ("Job.exchanges", "across * (parts + 2)", "across * parts"),
    ("Job.exchanges", "within + 2 * across", "within + across"),
    ("Job.exchanges", "int(layout.ep > nodes)", "1"),
    ("Job.exchanges", "1 + self.numbers.fp8", "1"),
    ("backward_tape._experts", "tape.exchange(shapes.traffic.exchanges.home)", "pass"),
    ("layer_moments", "held, number * model", "held, 0 * model"),
) + of(
    REPLAY,
    ("taking_turns", "left[me] = piece.left, piece.weights_left", "left[me] = piece.most, piece.weights"),
    ("Moment.running", "and not together", ""),
    ("phases._behind", "return FREED[before] if regathers and before in FREED else", "return"),
    ("phases._behind", "max(KEPT.get(before, before), BEGUN)", "max(before, BEGUN)"),
    ("phases._behind", 'FREED_SUMMED if run.kind == "W" and before in KEPT else SUMMED', "SUMMED"),
) + of(
    REDUCTIONS,
    ("backward_bytes.in_turn", " + size.of_output(instant.ending)", ""),
    ("backward_bytes.in_turn", "+ copied - summed * ending", "+ copied"),
    ("backward_bytes.in_turn", " - instant.freed", ""),
    ("Tape.exchange", "self._piece += 1", "pass"),
) + of(
    COVERED,
    ("backward_tape._experts", 'tape.end("router")', "pass"),
    ("stage_bytes.input_bytes", "if offloads else", "if not offloads else"),
    ("stage_forward._pieces", "not job.regathers or before in (BEFORE, *FREED_BY_FORWARDS)", "True"),
    ("split_backwards", "weights is not None and before in FREED_BY_FORWARDS", "weights is not None"),
) + of(
    (f"{COVERED[0]}::test_the_fullest_rank_takes_what_is_planned[70]",),
    ("Layers.of_outer", "self.embedding if", "0.0 if"),
) + of(
    (f"{COVERED[0]}::test_the_fullest_rank_takes_what_is_planned[16]",),
    ("backward_units.of_last_mlp", "return 0", "pass"),
)
