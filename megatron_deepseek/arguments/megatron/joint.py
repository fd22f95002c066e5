"""Options of Megatron-LM's relatives that mean something together: each function replaces some words of a line.

They read and change a `Line` (line.py), in the order of JOINT. What cannot be said here becomes a problem of the line.
"""

from megatron_deepseek.arguments.megatron.line import Line


def noop_layers(line: Line) -> None:
    """Leave out MindSpeed-LLM's layers that do nothing and fill up the last stages: stages are cut by cost here."""
    name, given = "--noop-layers", line.value("--noop-layers")
    if given is None:
        return
    numbers, layers = sorted(_numbers(given)), _number(line.value("--num-layers"))
    if layers is None or not numbers or numbers != list(range(layers - len(numbers), layers)):
        line.refuse(name, "only the last layers of --num-layers may be such; leave it out, and see "
                    "--pipeline-model-parallel-layout")
        return
    line.replace((name, "--num-layers"), f"--num-layers {layers - len(numbers)}")


def dense_layers(line: Line) -> None:
    """Make one list of first_k_dense_replace and moe_layer_freq of config.json, as Megatron-LM has it."""
    name, dense = "--first-k-dense-replace", _number(line.value("--first-k-dense-replace"))
    if line.value(name) is None:
        return
    layers, frequency = _number(line.value("--num-layers")), _number(line.value("--moe-layer-freq") or "1")
    if None in (dense, layers, frequency) or frequency < 1 or dense > layers:
        line.refuse(name, 'use --moe-layer-freq "([0]*3+[1]*58)": a 0 for each dense layer, a 1 for each with experts')
        return
    kinds = [int(layer >= dense and layer % frequency == 0) for layer in range(layers)]
    pattern = f"([0]*{dense}+[1]*{layers - dense})" if frequency == 1 else str(kinds).replace(" ", "")
    line.replace((name, "--moe-layer-freq"), f"--moe-layer-freq {pattern}")


def shared_experts(line: Line) -> None:
    """Give the width of all shared experts together, as Megatron-LM does, where config.json counts them."""
    name, number = "--n-shared-experts", _number(line.value("--n-shared-experts"))
    if line.value(name) is None:
        return
    width = _number(line.value("--moe-ffn-hidden-size") or line.value("--ffn-hidden-size"))
    if None in (number, width):
        line.refuse(name, "use --moe-shared-expert-intermediate-size, the width of all shared experts together")
        return
    line.replace((name,), f"--moe-shared-expert-intermediate-size {number * width}")


def rope_scaling_factor(line: Line) -> None:
    """Read MindSpeed-LLM's factor of YaRN, known by its --rope-scaling-type; Megatron-LM's own factor spares MLA."""
    name, factor = "--rope-scaling-factor", line.value("--rope-scaling-factor")
    if factor is not None and line.value("--rope-type") is not None:
        line.replace((name,), f"--rotary-scaling-factor {factor}")


def multi_token_prediction(line: Line) -> None:
    """Read the switch and the number that Pai-Megatron-Patch has for MTP."""
    switch, number = "--use-multi-token-prediction", "--num-mtp-predictor"
    if line.value(switch) is not None:
        line.replace((switch, number), f"--mtp-num-layers {line.value(number) or 1}")
    elif line.value(number) is not None:
        line.ignore(number)


def latent_attention(line: Line) -> None:
    """Leave out the heads of grouped-query attention beside --multi-latent-attention, which has sizes of its own."""
    if line.value("--multi-latent-attention") is not None:
        for name in ("--group-query-attention", "--kv-channels", "--num-query-groups"):
            line.ignore(name)


def sequence_balance(line: Line) -> None:
    """Read config.json's seq_aux, which is a type of balance loss."""
    if line.value("--seq-aux") is not None:
        line.replace(("--seq-aux",), "--moe-router-load-balancing-type seq_aux_loss")


def patched_tokenizer(line: Line) -> None:
    """Take the tokenizer from --load, as Pai-Megatron-Patch does."""
    name = "--patch-tokenizer-type"
    if line.value(name) is None:
        return
    load = line.value("--load")
    if line.value("--tokenizer-model") is not None or load is None:
        line.replace((name,), "--tokenizer-type HuggingFaceTokenizer")
    else:
        line.replace((name,), f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {load}")


def other_tokenizer(line: Line) -> None:
    """Say what to use in place of Megatron-LM's tokenizers that read other files than a tokenizer.json."""
    if line.value("--tokenizer-type") in OTHER_TOKENIZERS:
        line.refuse("--tokenizer-type", "use HuggingFaceTokenizer, and as --tokenizer-model the model's tokenizer.json "
                    "or its folder")


def context_parallel_algorithm(line: Line) -> None:
    """Read MindSpeed-LLM's name for how context ranks pass on keys and values."""
    name, algorithm = "--context-parallel-algo", line.value("--context-parallel-algo")
    if algorithm is None:
        return
    if _number(line.value("--context-parallel-size") or "1") == 1:
        line.ignore(name)
    elif algorithm == "megatron_cp_algo":
        line.replace((name,), "--cp-comm-type ring")
    else:
        line.refuse(name, "use --cp-comm-type ring or allgather: heads are not passed between context ranks")


def recomputed_attention(line: Line) -> None:
    """Leave out the scores of attention, which are never kept, so that there are none to recompute."""
    name, modules = "--recompute-modules", line.value("--recompute-modules")
    if modules is None or "core_attn" not in modules.split():
        return
    others = [module for module in modules.split() if module != "core_attn"]
    line.replace((name,), f"{name} {' '.join(others)}" if others else "")


def usual_evaluation(line: Line) -> None:
    """Evaluate on 100 batches where an interval is given alone, as Megatron-LM does."""
    if line.value("--eval-interval") is not None and line.value("--model") is None \
            and line.value("--eval-iters") is None and line.value("--full-validation") is None:
        line.replace((), "--eval-iters 100")


def without_effect(line: Line) -> None:
    """Leave out, without --model, what has no effect in Megatron-LM without another option. With --model, which
    Megatron-LM does not know, it is refused.
    """
    for name, needed in EFFECT_WITH:
        if line.value("--model") is None and line.value(needed) is None:
            line.ignore(name)


def usual_balance(line: Line) -> None:
    """Give a type of balance loss the weight 0 where none is given, as Megatron-LM does."""
    kind = line.value("--moe-router-load-balancing-type")
    if line.value("--model") is None and kind not in (None, "none") and line.value("--moe-aux-loss-coeff") is None:
        line.replace((), "--moe-aux-loss-coeff 0")


OTHER_TOKENIZERS = ("BertWordPieceCase", "BertWordPieceLowerCase", "GPT2BPETokenizer", "GPTSentencePieceTokenizer",
                    "Llama2Tokenizer", "MultimodalTokenizer", "NullMultimodalTokenizer", "SFTTokenizer",
                    "SentencePieceTokenizer", "TikTokenizer")
# (option, the option without which Megatron-LM does nothing about it)
EFFECT_WITH = (
    *((name, "--load") for name in ("--no-load-optim", "--finetune", "--ckpt-step")),
    *((name, "--save") for name in ("--save-interval", "--no-save-optim", "--async-save")),
    *((name, "--recompute-granularity") for name in ("--recompute-method", "--recompute-num-layers",
                                                     "--recompute-modules")),
    *((name, "--moe-expert-capacity-factor") for name in ("--moe-token-drop-policy",
                                                          "--moe-pad-expert-input-to-capacity")),
    *((name, "--wandb-project") for name in ("--wandb-exp-name", "--wandb-entity", "--wandb-save-dir")),
    *((name, "--fp8-format") for name in ("--fp8-recipe", "--fp8-param-gather")),
    ("--moe-router-bias-update-rate", "--moe-router-enable-expert-bias"), ("--manual-gc-interval", "--manual-gc"),
)
JOINT = (noop_layers, dense_layers, shared_experts, rope_scaling_factor, multi_token_prediction, latent_attention,
         sequence_balance, patched_tokenizer, other_tokenizer, context_parallel_algorithm, recomputed_attention,
         usual_evaluation, usual_balance, without_effect)
# The options that only these functions know: how many values they take, and what becomes of them.
JOINT_OPTIONS = (
    ("--noop-layers", "1", "`--num-layers` without them, where they are the last ones"),
    ("--first-k-dense-replace", "1", '`--moe-layer-freq "([0]*K+[1]*(N-K))"`'),
    ("--n-shared-experts", "1", "`--moe-shared-expert-intermediate-size`, so many times `--moe-ffn-hidden-size`"),
    ("--use-multi-token-prediction", "", "`--mtp-num-layers`, as many as `--num-mtp-predictor` or 1"),
    ("--num-mtp-predictor", "1", "`--mtp-num-layers` with `--use-multi-token-prediction`, else ignored"),
    ("--seq-aux", "", "`--moe-router-load-balancing-type seq_aux_loss`"),
    ("--patch-tokenizer-type", "1", "`--tokenizer-type HuggingFaceTokenizer --tokenizer-model` with the path of "
     "`--load`, where `--tokenizer-model` is not given"),
    ("--context-parallel-algo", "1", "`--cp-comm-type ring` for megatron_cp_algo; refused for others with several "
     "context ranks"),
)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _numbers(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []
