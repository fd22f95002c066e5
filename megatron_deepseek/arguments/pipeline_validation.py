"""The validation rules of pipeline stages and schedules: a part of the table in validation.py."""

from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.rule import PP, Rule
from megatron_deepseek.parallel import layout_string, schedule_rules


def _layout_error(r: Request) -> bool:
    """Return False, or raise the ValueError of the parser of layout strings."""
    if r.layout is not None:
        layout_string.parse(r.layout, r.model.num_hidden_layers, r.model.num_nextn_predict_layers)
    return False


PIPELINE = (
    Rule("the stages of equal size do not divide the layers",
         lambda r: r.args.num_layers_per_virtual_pipeline_stage is not None
         and r.split_parts % (r.pp * r.args.num_layers_per_virtual_pipeline_stage) != 0,
         "--num-layers-per-virtual-pipeline-stage {r.args.num_layers_per_virtual_pipeline_stage} x "
         f"{PP} does not divide {{r.split_text}}"),
    Rule("the pipeline-parallel size does not divide the stages of the layout", lambda r: r.stage_count % r.pp != 0,
         "--pipeline-model-parallel-layout {r.args.pipeline_model_parallel_layout!r} has {r.stage_count} stages, "
         f"which {PP} does not divide"),
    Rule("one pipeline rank does not hold several stages", lambda r: r.pp == 1 and r.stage_count > 1,
         f"{PP} holds one stage, not the {{r.stage_count}} that the arguments for stages ask for"),
    Rule("the schedule does not run with so many stages on a rank",
         lambda r: r.pp > 1 and not schedule_rules.takes_virtual_stages(r.schedule, r.virtual_stages),
         "--pipeline-schedule {r.schedule} does not run with {r.virtual_stages} stages on a rank ({r.stage_count} "
         f"stages, {PP})"),
    Rule("layers for the ends of the pipeline need several pipeline ranks", lambda r: r.pp == 1 and r.pipeline_ends,
         f"{{r.pipeline_ends}} needs more pipeline ranks than one, not {PP}"),
    Rule("the layers of the ends are given beside those of every stage",
         lambda r: r.pipeline_ends and (r.args.pipeline_model_parallel_layout is not None
                                                           or r.args.num_layers_per_virtual_pipeline_stage),
         "{r.pipeline_ends} conflicts with --pipeline-model-parallel-layout and "
         "--num-layers-per-virtual-pipeline-stage, which say what every stage holds"),
    Rule("the embedding or the loss counts as a layer where the layers of stages are given",
         lambda r: r.accounted and (r.pipeline_ends or r.args.pipeline_model_parallel_layout is not None),
         "{r.accounted} divides the layers evenly, and conflicts with --pipeline-model-parallel-layout, "
         "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers, which say how they are divided"),
    Rule("the layers, with the parts that count as one, do not divide among the stages",
         lambda r: r.accounted and r.pp > 1 and r.split_parts % r.stage_count != 0,
         f"{{r.split_text}} is not a multiple of the {{r.stage_count}} stages of {PP} x {{r.virtual_stages}} on a "
         "rank"),
    Rule("the ranks between the ends do not divide the layers left to them",
         lambda r: r.pipeline_ends and not r.ends_divide,
         "{r.pipeline_ends} of --num-layers {r.model.num_hidden_layers} leaves layers that do not divide evenly "
         f"over the other ranks of {PP} and the stages of a rank ({{r.virtual_stages}})"),
    Rule("the stages are more than the layers",
         lambda r: r.layout is None and r.stage_count > r.model.num_hidden_layers,
         "--num-layers {r.model.num_hidden_layers} is less than the {r.stage_count} stages of "
         f"{PP} x {{r.virtual_stages}} on a rank"),
    Rule("the layout string does not fit the model",
         _layout_error, "(the parser of layout strings says what is wrong)"),
    Rule("the schedule does not run with so many micro-batches",
         lambda r: r.pp > 1 and r.refused_microbatches is not None,
         "--pipeline-schedule {r.schedule} does not run with {r.refused_microbatches[0]} micro-batches for each "
         "data-parallel rank (--global-batch-size {r.refused_microbatches[1]}, --micro-batch-size "
         "{r.args.micro_batch_size}); it needs {r.microbatch_rule}"),
)
