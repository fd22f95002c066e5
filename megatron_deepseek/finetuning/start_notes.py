"""What a fine-tuning says at its start: template and mask, MTP, balance of the experts, learning rate, rows."""

from collections.abc import Iterator

from megatron_deepseek.fine_tuning_settings import DistillationSettings
from megatron_deepseek.finetuning.data import Conversations
from megatron_deepseek.finetuning.plan import batches_of
from megatron_deepseek.model.architecture.freezing import is_frozen, parameter_shapes
from megatron_deepseek.settings import LearningRateSettings, Settings
from megatron_deepseek.training.timeline import last_iteration


def start_notes(settings: Settings, data: Conversations) -> Iterator[str]:
    """Yield the lines."""
    tuning = settings.fine_tuning
    yield f"template {data.train.template}: {data.train.mask_rule}"
    yield from _rows(settings, data)
    noise = f", NEFTune alpha {tuning.neftune_alpha:g}" if tuning.neftune_alpha else ""
    yield f"loss: {_objective(settings)}{noise}"
    yield f"MTP: {_mtp(settings)}"
    yield f"experts: {_balance(settings)}"
    yield f"learning rate: {_rates(settings.learning_rate)}; {_adam(settings)} (--recipe {tuning.recipe})"


def _objective(settings: Settings) -> str:
    preference, distillation = settings.fine_tuning.preference, settings.fine_tuning.distillation
    if distillation is not None:
        return _mixture(distillation)
    if preference is None:
        return f"the mean over {settings.fine_tuning.loss_average}s"
    over = "answers" if preference.objective == "kto" else "pairs"
    reference = "" if not preference.has_reference else (
        "; the reference is the model without its adapters, computed at every step" if settings.lora is not None else
        "; the reference's log-probabilities are computed once and kept with the tokenised data")
    beta = f", beta {preference.beta:g}" if preference.objective != "reward" else ""
    return f"{preference.objective}{beta}, the mean over {over}{reference}"


def _mixture(distillation: DistillationSettings) -> str:
    """Return what is learnt from a teacher and what from labels."""
    beta = f" (beta {distillation.kd_jsd_beta:g})" if distillation.kd_loss == "jsd" else ""
    labels = f" + {1 - distillation.kd_ratio:g} x the labels'" if distillation.kd_ratio < 1 else ""
    return (f"{distillation.factor:g} x {distillation.kd_loss}{beta} from {distillation.teacher} at temperature "
            f"{distillation.kd_temperature:g}{labels}, means over tokens")


def _rows(settings: Settings, data: Conversations) -> Iterator[str]:
    for name, counts in zip(data.train.names, data.train.counts):
        dropped = "".join(f", {number:,} dropped: {reason}" for reason, number in counts.dropped.items())
        yield (f"{name}: {counts.samples:,} samples of {counts.rows:,} rows, {counts.trained:,} of {counts.tokens:,} "
               f"tokens with loss{dropped}")
        yield from counts.bad
    steps = batches_of(data.rows_per_epoch, settings.batch.global_batch_size)
    packed = "packed" if settings.fine_tuning.packing else "not packed"
    epochs = f", --epochs {settings.run.epochs}: {last_iteration(settings.run, settings.batch):,} steps" \
        if settings.run.epochs is not None else ""
    yield (f"an epoch: {data.num_samples:,} samples, {packed}, in {data.rows_per_epoch:,} rows of "
           f"{settings.data.seq_length:,} tokens, {steps:,.1f} steps{epochs}")


def _mtp(settings: Settings) -> str:
    depths, model = settings.model.num_nextn_predict_layers, settings.model
    if depths and settings.fine_tuning.preference is not None:
        return f"{depths} module{'s' * (depths > 1)} left as loaded: the objective is of the next token alone"
    if not depths:
        return "none (--mtp-num-layers 0)" if settings.run.drop_mtp else "none: the model has no such module"
    first = model.num_hidden_layers
    prefixes = tuple(f"model.layers.{first + depth}." for depth in range(depths))
    own = [name for name in parameter_shapes(model) if name.startswith(prefixes)]
    if all(is_frozen(name, settings.run.freeze_parameters) for name in own):
        return f"{depths} frozen module{'s' * (depths > 1)}, whose loss still trains the rest"
    return (f"{depths} module{'s' * (depths > 1)} trained, --mtp-loss-scaling-factor "
            f"{settings.loss.mtp_loss_scaling_factor:g}, on the same mask, never across the end of a conversation")


def _balance(settings: Settings) -> str:
    loss, model = settings.loss, settings.model
    if not model.n_routed_experts:
        return "none"
    rate = loss.moe_router_bias_update_rate
    bias = "" if model.topk_method != "noaux_tc" else (
        f"routers' biases are updated by {rate:g} a step" if rate else
        "routers' biases stay as they are (--moe-router-bias-update-rate)")
    balance = f"balance loss {loss.balance_type}, --moe-aux-loss-coeff {loss.moe_aux_loss_coeff:g}" \
        if loss.balance_type != "none" else "no balance loss"
    return "; ".join(filter(None, (bias, balance)))


def _rates(rates: LearningRateSettings) -> str:
    if rates.lr_decay_style == "constant":
        shape = f"constant {rates.lr:g}"
    else:
        shape = f"{rates.lr_decay_style} from {rates.lr:g} to {rates.min_lr:g}"
    lengths = ((rates.lr_warmup_iters, "iterations"), (rates.lr_warmup_samples, "rows"),
               (rates.lr_warmup_fraction, "of the decay"))
    warmup = next((f"{number:g} {unit}" for number, unit in lengths if number), None)
    return shape + (f", after a warm-up of {warmup} from {rates.lr_warmup_init:g}" if warmup else "")


def _adam(settings: Settings) -> str:
    adam = settings.optimizer
    return (f"AdamW {adam.adam_beta1:g}, {adam.adam_beta2:g}, weight decay {adam.weight_decay:g}, "
            f"clip {adam.clip_grad:g}")
