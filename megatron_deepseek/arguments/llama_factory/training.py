"""What LLaMA-Factory says of the training itself: batches, length, learning rate, optimizer, files, ranks.

Its defaults are transformers': they are always given, since those here are other ones.
"""

import math

from megatron_deepseek.arguments.llama_factory.recipe import Recipe

# Of Megatron's ranks, which LLaMA-Factory has for its Megatron backends: our option of the same meaning.
_MEGATRON = {"tensor_model_parallel_size": "--tensor-model-parallel-size",
          "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
          "expert_model_parallel_size": "--expert-model-parallel-size",
          "context_parallel_size": "--context-parallel-size",
          "virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank"}
_DIVIDING = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
              "inverse_sqrt": "inverse-square-root", "cosine_with_min_lr": "cosine",
              "cosine_warmup_with_min_lr": "cosine", "warmup_stable_decay": "WSD"}
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")


def ranks(r: Recipe) -> int:
    """Translate the layout. Return the data-parallel ranks. Raise ValueError if the others do not divide all."""
    others = 1
    for key, option in _MEGATRON.items():
        number = r.integer(key, 1)
        if number > 1:
            r.put(option, number)
        others *= number if key in _DIVIDING else 1
    if r.flag("sequence_parallel"):
        r.put("--sequence-parallel")
    dispatcher = r.text("moe_token_dispatcher_type")
    if dispatcher in ("alltoall", "allgather"):
        r.put("--moe-token-dispatcher-type", dispatcher)
    elif dispatcher is not None:
        r.leave("moe_token_dispatcher_type", dispatcher, "tokens travel by alltoall, allgather or grouped")
    if r.world % others:
        raise ValueError(f"{r.world} ranks are not a multiple of the {others} of a data rank; --nproc-per-node and "
                         "--nnodes say how many there are")
    return r.world // others


def batches(r: Recipe, data_ranks: int) -> None:
    """Translate the batch of a device and its accumulation to the global batch."""
    micro, steps = r.integer("per_device_train_batch_size", 8), r.integer("gradient_accumulation_steps", 1)
    r.put("--micro-batch-size", micro)
    r.put("--global-batch-size", micro * steps * data_ranks)


def length(r: Recipe) -> float:
    """Translate how long the run is. Return the epochs, which pre-training counts otherwise."""
    epochs, steps = r.number("num_train_epochs", 3.0), r.integer("max_steps", -1)
    if steps > 0:
        r.put("--train-iters", steps)
    elif "--epochs" in r.options:
        r.put("--epochs", max(1, math.ceil(epochs)))
        if epochs != int(epochs):
            r.differs.append(f"num_train_epochs {epochs:g}: an epoch is whole here; max_steps is for a part of one")
    return epochs


def rate(r: Recipe) -> None:
    """Translate the schedule. Raise ValueError for one that is not there."""
    kind, peak = r.text("lr_scheduler_type", "linear"), r.number("learning_rate", 5e-5)
    more = r.take("lr_scheduler_kwargs") or {}
    if kind not in _SCHEDULES:
        raise ValueError(f"lr_scheduler_type {kind} is not there: {', '.join(_SCHEDULES)} are")
    if not isinstance(more, dict):
        raise ValueError(f"lr_scheduler_kwargs: {more} are no keys with values")
    r.put("--lr", float(peak))
    r.put("--lr-decay-style", _SCHEDULES[kind])
    lowest = more.pop("min_lr", None)
    lowest = more.pop("min_lr_rate", 0.0) * peak if lowest is None else lowest
    r.put("--min-lr", float(peak if _SCHEDULES[kind] == "constant" else lowest))
    if kind == "inverse_sqrt":
        r.differs.append("lr_scheduler_type inverse_sqrt: the fall is by the root of the warm-up's length, as Megatron-"
                         "LM's; transformers takes 10,000 steps for it where there is no warm-up")
    if kind == "warmup_stable_decay":
        decay = more.pop("num_decay_steps", None)
        if decay is None:
            raise ValueError("lr_scheduler_type warmup_stable_decay needs lr_scheduler_kwargs with num_decay_steps")
        r.put("--lr-wsd-decay-iters", int(decay))
        r.put("--lr-wsd-decay-style", more.pop("decay_type", "cosine"))
        more.pop("num_stable_steps", None)  # what is left between
    r.leave("lr_scheduler_kwargs", more or None, "the schedule has no such numbers here")
    _warm_up(r)


def _warm_up(r: Recipe) -> None:
    steps, part = r.number("warmup_steps", 0), r.number("warmup_ratio", 0.0)
    if 0 < steps < 1:  # transformers 5 reads it as a part
        steps, part = 0, steps
    if steps:
        r.put("--lr-warmup-iters", int(steps))
    elif part:
        r.put("--lr-warmup-fraction", float(part))
    if (steps or part) and r.arguments["--lr-decay-style"] == ["constant"] and \
            r.given.get("lr_scheduler_type") == "constant":
        del r.arguments["--lr-warmup-iters" if steps else "--lr-warmup-fraction"]  # transformers has none there either


def optimizer(r: Recipe) -> None:
    """Translate AdamW, clipping, noise and the seed."""
    name = r.text("optim", _ADAMW[0])
    if name not in _ADAMW:
        r.leave("optim", name, "the optimizer is AdamW; --exp-avg-dtype and --exp-avg-sq-dtype make its moments "
                "smaller")
    for key, option, default in (("weight_decay", "--weight-decay", 0.0), ("adam_beta1", "--adam-beta1", 0.9),
                                 ("adam_beta2", "--adam-beta2", 0.999), ("adam_epsilon", "--adam-eps", 1e-8),
                                 ("max_grad_norm", "--clip-grad", 1.0)):
        r.put(option, float(r.number(key, default)))
    r.put("--seed", r.integer("seed", 42))
    noise = r.number("neftune_noise_alpha")
    if noise and "--neftune-alpha" in r.options:
        r.put("--neftune-alpha", float(noise))
    else:
        r.leave("neftune_noise_alpha", noise, "noise is for fine-tuning")


def files(r: Recipe) -> None:
    """Translate what is written, where and how often."""
    directory = r.text("output_dir")
    if directory is None:
        raise ValueError("output_dir is missing")
    r.put("--save", directory)
    strategy, steps = r.text("save_strategy", "steps"), r.number("save_steps", 500)
    if strategy == "steps" and steps >= 1:
        r.put("--save-interval", int(steps))
    elif strategy != "no":
        r.leave("save_strategy", f"{strategy} (save_steps {steps:g})", "checkpoints are every --save-interval "
                "iterations, and at the end")
    limit = r.integer("save_total_limit")
    if limit:
        r.put("--keep-last", limit)
    if r.flag("save_only_model"):
        r.put("--no-save-optim")
    if "--lora-rank" in r.arguments:
        r.put("--save-adapter", f"{directory.rstrip('/')}-adapter")
    else:
        r.put("--save-hf", f"{directory.rstrip('/')}-hf")
    if r.flag("overwrite_output_dir"):
        r.differs.append("overwrite_output_dir: the same command goes on with the run in --save; --overwrite begins "
                         "anew and removes it")
    resumed = r.take("resume_from_checkpoint")
    if isinstance(resumed, str):
        r.leave("resume_from_checkpoint", resumed, "a run goes on from its own --save; checkpoints of transformers "
                "hold weights alone for it: give that directory as model_name_or_path")


def reports(r: Recipe) -> None:
    """Translate what is logged, and to whom."""
    r.put("--log-interval", max(1, int(r.number("logging_steps", 500))))
    names, run_name, project = r.names("report_to"), r.text("run_name"), r.text("project", "huggingface")
    directory = r.given.get("output_dir") or ""
    for name in names:
        if name == "tensorboard":
            r.put("--tensorboard-dir", f"{str(directory).rstrip('/')}/tensorboard")
        elif name == "wandb":
            r.put("--wandb-project", project)
            if run_name is not None:
                r.put("--wandb-exp-name", run_name)
        elif name != "none":
            r.leave("report_to", name, "metrics.jsonl, TensorBoard and Weights & Biases are written")
    if r.flag("plot_loss"):
        r.differs.append("plot_loss: afterwards, python tools/plot_metrics.py draws metrics.jsonl")
