"""The validation rules of fine-tuning: a part of the table in validation.py."""

from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.rule import Rule


def _evaluates(r: Request) -> bool:
    return r.args.eval_iters is not None or r.args.eval_interval is not None


FINE_TUNING = (
    Rule("the longest conversation exceeds the row",
         lambda r: r.fine_tunes and (r.args.max_length or 0) > r.args.seq_length,
         "--max-length {r.args.max_length} does not fit into rows of --seq-length {r.args.seq_length}"),
    Rule("evaluation needs held-out conversations",
         lambda r: r.fine_tunes and _evaluates(r) and not r.args.eval_dataset,
         "--eval-iters {r.args.eval_iters} and --eval-interval {r.args.eval_interval} need --eval-dataset"),
    Rule("answers need held-out conversations",
         lambda r: r.fine_tunes and r.args.generate_every is not None and not r.args.eval_dataset,
         "--generate-every {r.args.generate_every} needs --eval-dataset, whose prompts it takes"),
)
