"""The validation rules: every combination of arguments that is refused, in one table.

All that applies is reported, but for what only follows from something that is reported already: rules stand in topics
(rule.py), which say on what they rely. Messages are format strings over a Request `r`.
"""

from megatron_deepseek.arguments.data_paths import data_paths
from megatron_deepseek.arguments.distillation import DISTILLATION
from megatron_deepseek.arguments.experts_validation import EXPERTS, OVERLAP, OVERLAPPED_DISPATCH, without_experts
from megatron_deepseek.arguments.finetuning_validation import FINE_TUNING
from megatron_deepseek.arguments.base_weights import BASE_WEIGHTS
from megatron_deepseek.arguments.grpo_validation import GRPO
from megatron_deepseek.arguments.lora import LORA
from megatron_deepseek.arguments.optimizer_validation import OPTIMIZER
from megatron_deepseek.arguments.parser import RECOMPUTE_MODULES
from megatron_deepseek.arguments.pipeline_validation import PIPELINE
from megatron_deepseek.arguments.preference import PREFERENCE
from megatron_deepseek.arguments.problems import Problems
from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.rule import CP, EP, ETP, PP, TP, Rule, Topic
from megatron_deepseek.model.architecture.families import has_family


def _data_error(r: Request) -> bool:
    """Return False, or raise the ValueError of the reader of pre-training's data arguments."""
    if r.pretrains:
        data_paths(r.args)
    return False


def _loads_save(r: Request) -> bool:
    return None not in (r.args.load, r.args.save) and r.args.load.resolve() == r.args.save.resolve()


def _without_save(option: str, value: str = "") -> Rule:
    dest = option[2:].replace("-", "_")
    return Rule(f"{option} needs --save",
                lambda r: r.args.save is None and getattr(r.args, dest) not in (None, False),
                f"{option}{value} needs --save")


_UNBUILT = (
    Rule("padding the experts' input to their capacity is not supported",
         lambda r: r.args.moe_pad_expert_input_to_capacity,
         "--moe-pad-expert-input-to-capacity is not supported: the grouped GEMM takes any number of rows, so "
         "padding would only multiply zeros"),
    Rule("dropout in attention is not supported", lambda r: r.model.attention_dropout > 0,
         "--attention-dropout {r.model.attention_dropout} is not supported: DeepSeek trains without, and with it "
         "results would depend on the layout"),
    Rule("dropout of hidden states is not supported", lambda r: bool(r.args.hidden_dropout),
         "--hidden-dropout {r.args.hidden_dropout} is not supported: DeepSeek trains without"),
)

AUTO_LAYOUT = (
    Rule("a layout conflicts with --auto-layout",
         lambda r: r.args.auto_layout is not None and bool(r.given_beside_auto_layout),
         "--auto-layout {r.args.auto_layout} chooses {r.given_beside_auto_layout} itself; leave it out, or search by "
         "tools/plan.py search, which keeps what is given"),
    Rule("--auto-layout needs --global-batch-size",
         lambda r: r.args.auto_layout is not None and r.args.global_batch_size is None,
         "--auto-layout {r.args.auto_layout} needs --global-batch-size: which layouts are good depends on it"),
)

_RANKS = (
    Rule("the sizes ask for several ranks, but one process was started",
         lambda r: r.world_size == 1 and r.fewest_ranks > 1,
         "{r.dividing_sizes} needs {r.fewest_ranks} processes or a multiple, and this is one alone; start them by: "
         "python tools/launch.py --nproc_per_node {r.fewest_ranks} {r.entry} ..."),
    Rule("the tensor- and pipeline-parallel sizes do not divide the number of ranks",
         lambda r: r.world_size % (r.tp * r.pp) != 0,
         f"{TP} x {PP} does not divide the {{r.world_size}} ranks of the job"),
    Rule("the tensor- and context-parallel sizes do not divide the ranks of a stage",
         lambda r: r.stage_ranks % (r.tp * r.cp) != 0,
         f"{TP} x {CP} does not divide the {{r.stage_ranks}} ranks of a pipeline stage ({{r.world_size}} ranks, "
         f"{PP})"),
    Rule("expert parallelism needs experts", lambda r: r.ep > 1 and not r.model.n_routed_experts,
         f"{EP} conflicts with --num-experts 0: there are no experts to spread",
         without_experts("expert parallel, alltoall", "expert parallel, allgather", "expert parallel, grouped",
                          OVERLAPPED_DISPATCH)),
    Rule("the expert-parallel size does not divide the ranks of a stage", lambda r: r.stage_ranks % r.ep != 0,
         f"{EP} does not divide the {{r.stage_ranks}} ranks of a pipeline stage ({{r.world_size}} ranks, {PP})"),
    Rule("expert tensor parallelism needs experts", lambda r: r.etp > 1 and not r.model.n_routed_experts,
         f"{ETP} conflicts with --num-experts 0: there are no experts to divide",
         without_experts("expert tensor parallel")),
    Rule("the expert- and expert-tensor-parallel sizes do not divide the ranks of a stage",
         lambda r: r.stage_ranks % (r.ep * r.etp) != 0,
         f"{EP} x {ETP} does not divide the {{r.stage_ranks}} ranks of a pipeline stage ({{r.world_size}} ranks, "
         f"{PP})"),
)

_NODES = (
    Rule("grouped dispatch needs nodes that divide expert groups evenly",
         lambda r: r.args.moe_token_dispatcher_type == "grouped" and not r.nodes_divide_expert_groups,
         "--moe-token-dispatcher-type grouped needs nodes that divide expert groups evenly: "
         f"--moe-ranks-per-node {{r.ranks_per_node}}, {EP}, {ETP}"),
)

_SIZES = (
    Rule("no family of models has this router with grouped-query attention", lambda r: not has_family(r.model),
         "grouped-query attention goes with the routing of DeepSeekMoE (softmax, greedy, no groups, no expert bias, "
         "scaling 1) or without experts: topk_method {r.model.topk_method}, n_group {r.model.n_group}, "
         "routed_scaling_factor {r.model.routed_scaling_factor}",
         (("grouped-query attention", "router group-limited"), ("grouped-query attention", "router noaux_tc"))),
    Rule("twice the context-parallel size does not divide the sequence length",
         lambda r: r.cp > 1 and r.args.seq_length % (2 * r.cp) != 0,
         f"--seq-length {{r.args.seq_length}} does not divide into 2 x {CP} chunks, two for each rank"),
    Rule("the expert-tensor-parallel size does not divide the width of an expert",
         lambda r: r.model.n_routed_experts > 0 and r.model.moe_intermediate_size % r.etp != 0,
         f"{ETP} does not divide --moe-ffn-hidden-size {{r.model.moe_intermediate_size}}"),
    Rule("the expert-parallel size does not divide the number of experts",
         lambda r: r.model.n_routed_experts % r.ep != 0,
         f"{EP} does not divide --num-experts {{r.model.n_routed_experts}}"),
    Rule("the tensor-parallel size does not divide the number of attention heads",
         lambda r: r.model.num_attention_heads % r.tp != 0,
         f"{TP} does not divide --num-attention-heads {{r.model.num_attention_heads}}"),
    Rule("of the tensor-parallel size and the heads of keys and values neither is a multiple of the other",
         lambda r: r.model.num_kv_heads % r.tp and r.tp % r.model.num_kv_heads,
         f"{TP} neither divides --num-query-groups {{r.model.num_kv_heads}} nor is a multiple of it"),
    Rule("the tensor-parallel size does not divide the size of the vocabulary",
         lambda r: r.model.vocab_size % r.tp != 0,
         f"{TP} does not divide --vocab-size {{r.model.vocab_size}}"),
    Rule("the tensor-parallel size does not divide the width of the dense layers",
         lambda r: r.model.intermediate_size % r.tp != 0,
         f"{TP} does not divide --ffn-hidden-size {{r.model.intermediate_size}}"),
    Rule("the tensor-parallel size does not divide the width of the shared experts",
         lambda r: r.model.n_routed_experts > 0 and r.shared_width % r.tp != 0,
         f"{TP} does not divide --moe-shared-expert-intermediate-size {{r.shared_width}}"),
    Rule("the tensor- and context-parallel sizes do not divide the sequence length",
         lambda r: (r.args.sequence_parallel or r.model.n_routed_experts > 0) and r.args.seq_length % (r.tp * r.cp),
         f"{TP} x {CP} does not divide --seq-length {{r.args.seq_length}}, which it must with --sequence-parallel "
         "and with experts"),
)

_BATCH = (
    Rule("the sequence length exceeds the model's positions",
         lambda r: r.args.seq_length > r.model.max_position_embeddings,
         "--seq-length {r.args.seq_length} is longer than --max-position-embeddings "
         "{r.model.max_position_embeddings}"),
    Rule("the micro-batches of the data ranks do not divide the global batch", lambda r: r.uneven_batch is not None,
         "--global-batch-size {r.uneven_batch} is not a multiple of --micro-batch-size {r.args.micro_batch_size} x "
         "{r.dp} data-parallel ranks"),
    Rule("the samples do not fill one batch",
         lambda r: r.args.train_samples is not None and r.args.train_samples < r.batch_sizes[0],
         "--train-samples {r.args.train_samples} is less than one batch of {r.batch_sizes[0]}"),
)

_FP8 = (
    Rule("an FP8 recipe needs an FP8 format", lambda r: r.args.fp8_recipe is not None and r.args.fp8_format is None,
         "--fp8-recipe {r.args.fp8_recipe} needs --fp8-format e4m3"),
    Rule("gathering FP8 weights needs an FP8 format", lambda r: r.args.fp8_param_gather and r.args.fp8_format is None,
         "--fp8-param-gather needs --fp8-format e4m3"),
    Rule("the FP8 format is not e4m3", lambda r: r.args.fp8_format == "hybrid",
         "--fp8-format hybrid is not supported: with a scale for each tile E4M3 has the range for gradients too, "
         "and more precision than E5M2; use e4m3"),
    Rule("the FP8 recipe is not blockwise", lambda r: r.args.fp8_recipe not in (None, "blockwise"),
         "--fp8-recipe {r.args.fp8_recipe} is not supported, only blockwise: DeepSeek-V3's scales, 1x128 and "
         "128x128"),
)

_RUN = (
    Rule("the data is not given, given twice or unreadable",
         _data_error, "(the reader of data arguments says what is wrong: none, several, unreadable)"),
    Rule("recomputing the experts' activation needs experts",
         lambda r: "moe_act" in (r.args.recompute_modules or ()) and not r.model.n_routed_experts,
         "--recompute-modules moe_act conflicts with --num-experts 0", without_experts("recompute moe_act")),
    Rule("modules to recompute need selective recomputation",
         lambda r: r.args.recompute_modules is not None and r.args.recompute_granularity != "selective",
         "--recompute-modules {r.args.recompute_modules} needs --recompute-granularity selective, not "
         "{r.args.recompute_granularity}",
         tuple(("recompute layers", f"recompute {module}") for module in RECOMPUTE_MODULES)),
    Rule("a method of recomputation needs full recomputation",
         lambda r: (r.args.recompute_method or r.args.recompute_num_layers) is not None
         and r.args.recompute_granularity != "full",
         "--recompute-method {r.args.recompute_method} and --recompute-num-layers {r.args.recompute_num_layers} "
         "need --recompute-granularity full, not {r.args.recompute_granularity}"),
    Rule("recomputing several layers as one is not supported", lambda r: r.args.recompute_num_layers not in (None, 1),
         "--recompute-num-layers {r.args.recompute_num_layers} is not supported, only 1"),
    Rule("evaluation needs validation data",
         lambda r: r.pretrains and r.evaluates and r.validation_weight == 0,
         "{r.evaluation} has no data: --split {r.args.split} gives validation the weight 0, or "
         "--valid-data-path is missing"),
    Rule("an interval of evaluations needs evaluations",
         lambda r: r.pretrains and r.args.eval_interval is not None and r.args.eval_iters is None
         and not r.args.full_validation,
         "--eval-interval {r.args.eval_interval} needs --eval-iters or --full-validation"),
    Rule("options of tasks need tasks", lambda r: not r.args.eval_tasks and r.options_of_tasks,
         "{r.options_of_tasks} needs --eval-tasks"),
    Rule("several validation sets need evaluations",
         lambda r: r.pretrains and r.args.multiple_validation_sets and not r.evaluates,
         "--multiple-validation-sets needs --full-validation or --eval-iters"),
    Rule("names of validation sets need several of them",
         lambda r: r.pretrains and bool(r.args.validation_set_names) and not r.args.multiple_validation_sets,
         "--validation-set-names needs --multiple-validation-sets"),
    Rule("a name is that of two validation sets", lambda r: r.pretrains and r.repeated_set_name is not None,
         "--validation-set-names has {r.repeated_set_name} twice"),
    Rule("positions by document need attention by document",
         lambda r: r.args.reset_position_ids and not r.args.reset_attention_mask,
         "--reset-position-ids needs --reset-attention-mask: without it tokens attend across documents, where "
         "positions that begin anew have no meaning"),
    _without_save("--save-interval", " {r.args.save_interval}"),
    _without_save("--save-every-seconds", " {r.args.save_every_seconds}"),
    _without_save("--keep-last", " {r.args.keep_last}"),
    _without_save("--async-save"),
    _without_save("--no-save-optim"),
    _without_save("--chat-template", " {r.args.chat_template}"),
    Rule("an export needs --save", lambda r: r.args.save_hf is not None and r.args.save is None,
         "--save-hf {r.args.save_hf} needs --save: it is made from the last checkpoint"),
    Rule("an export needs a directory other than --save",
         lambda r: None not in (r.args.save_hf, r.args.save) and r.args.save_hf.resolve() == r.args.save.resolve(),
         "--save-hf {r.args.save_hf} and --save {r.args.save} are one directory; an export needs its own"),
    Rule("a type of the export needs one", lambda r: r.args.save_hf_dtype is not None and r.args.save_hf is None,
         "--save-hf-dtype {r.args.save_hf_dtype} needs --save-hf"),
    Rule("a format of FP8 scales needs FP8 weights",
         lambda r: r.args.fp8_scale_format is not None and r.args.save_hf_dtype != "fp8",
         "--fp8-scale-format {r.args.fp8_scale_format} needs --save-hf-dtype fp8: other exports have no scales"),
    Rule("--init-mtp needs --load", lambda r: r.args.init_mtp and r.args.load is None,
         "--init-mtp needs --load: without it all weights are new"),
    Rule("--init-mtp needs MTP modules", lambda r: r.args.init_mtp and not r.model.num_nextn_predict_layers,
         "--init-mtp needs MTP modules: --mtp-num-layers is 0"),
    Rule("--all needs --explain-layout", lambda r: r.args.all and r.args.explain_layout is None,
         "--all needs --explain-layout, whose ranks it lists one by one"),
    Rule("--ckpt-step needs --load", lambda r: r.args.ckpt_step is not None and r.args.load is None,
         "--ckpt-step {r.args.ckpt_step} needs --load"),
    Rule("--finetune needs --load", lambda r: r.args.finetune and r.args.load is None, "--finetune needs --load"),
    Rule("--finetune would remove the run that it loads", lambda r: r.args.finetune and _loads_save(r),
         "--finetune begins at iteration 0, and would remove the run that it comes from: --load {r.args.load} needs "
         "another directory for --save"),
    _without_save("--overwrite"),
    Rule("--overwrite would remove the directory that is loaded", lambda r: r.args.overwrite and _loads_save(r),
         "--overwrite conflicts with --load {r.args.load}, the --save directory: it would remove what is loaded"),
    Rule("--no-load-optim needs --load", lambda r: r.args.no_load_optim and r.args.load is None,
         "--no-load-optim needs --load"),
    Rule("a limit of skipped steps needs --nan-policy skip",
         lambda r: r.args.max_skipped_steps is not None and r.args.nan_policy != "skip",
         "--max-skipped-steps {r.args.max_skipped_steps} needs --nan-policy skip, not {r.args.nan_policy}"),
    Rule("the profile ends before it begins",
         lambda r: r.args.profile and r.args.profile_step_start >= r.args.profile_step_end,
         "--profile-step-start {r.args.profile_step_start} is not below --profile-step-end "
         "{r.args.profile_step_end}"),
)

TOPICS = (
    Topic("auto layout", AUTO_LAYOUT, chained=True),
    Topic("unbuilt", _UNBUILT),
    Topic("ranks", _RANKS, chained=True),
    Topic("nodes", _NODES, after=("ranks",)),
    Topic("sizes", _SIZES),
    Topic("batch", _BATCH, after=("ranks",)),
    Topic("pipeline", PIPELINE, chained=True, after=("ranks", "batch")),
    Topic("experts", EXPERTS),
    Topic("overlap", OVERLAP, chained=True, after=("ranks", "pipeline")),
    Topic("fp8", _FP8),
    Topic("optimizer", OPTIMIZER),
    Topic("run", _RUN),
    Topic("lora", LORA),
    Topic("base weights", BASE_WEIGHTS, after=("ranks", "sizes", "experts")),
    Topic("fine-tuning", FINE_TUNING),
    Topic("preference", PREFERENCE),
    Topic("distillation", DISTILLATION),
    Topic("reinforcement", GRPO, after=("ranks", "batch")),
)
RULES = tuple(rule for topic in TOPICS for rule in topic.rules)


def check_auto_layout(request: Request) -> None:
    """Raise ValueError for what --auto-layout does not go with: the layout that it chooses is not there yet."""
    _check(request, TOPICS[:1])


def check(request: Request) -> None:
    """Raise Problems with the messages of all rules that apply, but for those that rely on what is wrong already."""
    _check(request, TOPICS)


def _check(request: Request, topics: tuple[Topic, ...]) -> None:
    found: dict[str, list[str]] = {}
    for topic in topics:
        found[topic.name] = [] if any(found[name] for name in topic.after) else topic.problems(request)
    problems = [problem for each in found.values() for problem in each]
    if problems:
        raise Problems(problems)
