"""What LLaMA-Factory says of preference tuning: the stages dpo, kto and rm."""

from megatron_deepseek.arguments.llama_factory.recipe import Recipe

STAGES = ("dpo", "kto", "rm")
_LOSSES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


def objective(r: Recipe, stage: str) -> None:
    """Translate the loss of a stage and its numbers. Raise ValueError for a loss that is not there."""
    {"dpo": _pairs, "kto": _labelled, "rm": _reward}[stage](r)
    length = r.arguments["--seq-length"][0]
    r.put("--max-length", length)
    r.put("--seq-length", 2 * int(length))
    del r.arguments["--loss-average"]
    r.differs.append("--seq-length: twice cutoff_len, since two answers always share a row")
    r.leave("ref_model", r.text("ref_model"), "the reference is what training begins from, or the base of its adapters")


def rows_of(r: Recipe, stage: str) -> None:
    """Count the batch in rows; a row of KTO has two answers, which LLaMA-Factory counts one by one."""
    size = int(r.arguments["--global-batch-size"][0])
    if stage != "kto" or "--packing" in r.arguments:
        return
    micro = int(r.arguments["--micro-batch-size"][0])
    if size % 2 or micro % 2:
        r.differs.append(f"--global-batch-size {size}: rows of two answers each, so twice the answers")
        return
    r.put("--micro-batch-size", micro // 2)
    r.put("--global-batch-size", size // 2)
    r.differs.append("--global-batch-size counts rows of two answers each")


def _pairs(r: Recipe) -> None:
    loss = r.text("pref_loss", "sigmoid")
    if loss not in _LOSSES:
        raise ValueError(f"pref_loss {loss} is not there: {', '.join(_LOSSES)} are")
    r.put("--objective", _LOSSES[loss])
    r.put("--beta", float(r.number("pref_beta", 0.1)))
    weight, gamma, smoothing = r.number("pref_ftx", 0.0), r.number("simpo_gamma", 0.5), r.number("dpo_label_smoothing")
    if loss == "simpo":
        r.put("--simpo-gamma", float(gamma))
    if loss == "sigmoid" and smoothing:
        r.put("--label-smoothing", float(smoothing))
    if weight and loss != "orpo":
        r.put("--rpo-alpha", float(weight))
    if weight or loss == "orpo":
        r.differs.append("the likelihood of chosen answers is a mean over their tokens; LLaMA-Factory's is over pairs")


def _labelled(r: Recipe) -> None:
    r.put("--objective", "kto")
    r.put("--beta", float(r.number("pref_beta", 0.1)))
    r.put("--desirable-weight", float(r.number("kto_chosen_weight", 1.0)))
    r.put("--undesirable-weight", float(r.number("kto_rejected_weight", 1.0)))
    weight = r.number("pref_ftx", 0.0)
    r.leave("pref_ftx", weight or None, "kto has no term for the likelihood here")
    r.differs.append("the KL term of kto is of answers that are put together at random, over the global batch")


def _reward(r: Recipe) -> None:
    if "--lora-rank" in r.arguments:
        raise ValueError("stage rm with finetuning_type lora is not there: a score head is trained with all weights "
                         "(finetuning_type full)")
    r.put("--objective", "reward")
    r.arguments.pop("--mtp-num-layers", None)  # a reward model has none in any case
    r.differs.append("the score head has no bias, as transformers' ...ForSequenceClassification; LLaMA-Factory's value "
                     "head has one, and its output head stays")
