"""A DeepSeek model, or the part of one that a pipeline stage holds.

Parameter names are Hugging Face's whatever the stage: model.embed_tokens, model.layers.N, model.norm, lm_head; MTP
module k is layer num_hidden_layers + k - 1, as in the released V3 weights.

What travels between stages is a stack of hidden states along the batch: the main model's, and after it the state of
every MTP depth already computed. Losses are made where the head is, and come out as one scalar: this micro-batch's
contribution to the loss of the global batch.

Shapes: B batch, S sequence, H hidden, M = 1 + MTP depth predictions of each token, v local vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.model.head import OutputHead
from megatron_deepseek.model.layer import DecoderLayer, MTPLayer, run_layer
from megatron_deepseek.model.moe import RouterStats
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.ops.rope import Places
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.pipeline import received
from megatron_deepseek.parallel.tensor import RMSNorm, column_linear
from megatron_deepseek.parallel.vocabulary import VocabParallelEmbedding


@dataclass
class Tally:
    """What a step's forwards leave behind on this rank, added up over its micro-batches.

    `losses`: sum of token losses / N of the main prediction and each MTP depth; `expert_counts`: by layer name;
    `dropped`: token copies above experts' capacity; `crossings`: how often a token was sent to another node;
    `sources_K2`: sum of main token losses, and labels, of each source.
    """

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    balance_loss: torch.Tensor | float = 0.0
    expert_counts: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: torch.Tensor | int = 0
    crossings: int = 0
    sources_K2: torch.Tensor | float = 0.0

    def add_loss(self, depth: int, loss: torch.Tensor) -> None:
        self.losses[depth] = self.losses.get(depth, 0) + loss.detach()

    def add_sources(self, sources_BK: torch.Tensor, loss_BS: torch.Tensor, mask_BS: torch.Tensor) -> None:
        sums_B2 = torch.stack([(loss_BS.detach() * mask_BS).double().sum(1), mask_BS.double().sum(1)], 1)
        self.sources_K2 = self.sources_K2 + sources_BK.double().T @ sums_B2

    def add_stats(self, layer: str, stats: RouterStats | None) -> None:
        if stats is None:
            return
        self.balance_loss = self.balance_loss + stats.balance_loss
        self.crossings = self.crossings + stats.crossings
        self.dropped = self.dropped + stats.dropped
        self.expert_counts[layer] = self.expert_counts.get(layer, 0) + stats.counts_E


@dataclass(frozen=True)
class StepContext:
    """What every micro-batch of a step shares: the global counts that its losses are divided by.

    `num_labels`: valid label tokens of the global batch for the main prediction and each MTP depth; `num_sequences`:
    sequences of the global batch.
    """

    num_labels: tuple[int, ...]
    num_sequences: int
    tally: Tally


class Trunk(nn.Module):
    """The `model.` part: embedding, layers, final norm; each only where the stage has it."""

    def __init__(self, stage: Stage, blueprint: Blueprint):
        super().__init__()
        config, tp = blueprint.config, blueprint.tp
        if stage.embedding or stage.mtp or (stage.loss and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleDict()
        for index in stage.layers:
            self.layers[str(index)] = DecoderLayer(index, blueprint)
        for depth in stage.mtp:
            index = config.num_hidden_layers + depth
            self.layers[str(index)] = MTPLayer(index, blueprint)
        if config.num_hidden_layers - 1 in stage.layers:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)


class DeepseekStage(nn.Module):
    """One pipeline stage; the whole model if `stage` holds everything.

    forward(x, labels, label_mask, step): x is token ids [B, S] on the first stage and stacked states elsewhere. The
    result is stacked states, or the loss on the last stage. `sources_BK` (one True in each row) has it tallied by
    source too. `routed_BMS` (`routed_tokens`): None where all tokens are routed.
    """

    def __init__(self, stage: Stage, blueprint: Blueprint, seq_length: int, device: torch.device,
                 mtp_loss_scale: float = 0.0, run_of: Callable[[int], Callable] = lambda position: run_layer,
                 loss_chunk_size: int | None = None):
        """`run_of`: how the layer at each position of this stage is run (layer.choose_run). `loss_chunk_size`: tokens
        whose logits exist at once (head.OutputHead).
        """
        super().__init__()
        self.stage, self.config, self.tp = stage, blueprint.config, blueprint.tp
        self.mtp_loss_scale, self.turns, self.meter = mtp_loss_scale, blueprint.turns, blueprint.etp.meter
        self.model = Trunk(stage, blueprint)
        self.runs = {index: run_of(position) for position, index in enumerate(self.model.layers)}
        if stage.loss and not self.config.tie_word_embeddings:
            self.lm_head = column_linear(self.config.hidden_size, self.config.vocab_size, blueprint.tp)
            self.head = OutputHead(self.tp, self.lm_head.local_weight, lambda: self.lm_head.product, loss_chunk_size)
        elif stage.loss:
            self.head = OutputHead(self.tp, self.model.embed_tokens.local_weight, chunk_size=loss_chunk_size)
        self.rope_2SD = blueprint.cp.own(rope_table(self.config, seq_length, device), dim=1)

    def forward(self, x: torch.Tensor, labels_BMS: torch.Tensor, label_mask_BMS: torch.Tensor, step: StepContext,
                documents_BS: torch.Tensor | None = None, sources_BK: torch.Tensor | None = None,
                routed_BMS: torch.Tensor | None = None) -> torch.Tensor:
        if not self.stage.holds_anything:
            return received(x).clone()  # what came is the pipeline's own buffer
        states = list(self.states(x, labels_BMS, step, documents_BS, routed_BMS))
        if not self.stage.loss:
            return torch.cat(states) if len(states) > 1 else states[0].contiguous()
        return self.loss(states, labels_BMS, label_mask_BMS, step, sources_BK)

    def states(self, x: torch.Tensor, labels_BMS: torch.Tensor, step: StepContext,
               documents_BS: torch.Tensor | None = None, routed_BMS: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The main state and those of the MTP depths up to and with this stage, [B, S, H] each."""
        x = self.model.embed_tokens(x) if self.stage.embedding else received(x)
        *states, current = x.split(labels_BMS.shape[0])
        places = Places(self.rope_2SD, documents_BS)
        routed = [None] * labels_BMS.shape[1] if routed_BMS is None else routed_BMS.unbind(1)
        for index in self.stage.layers:
            current = self._layer(index, step, places, routed[0], current)
        if hasattr(self.model, "norm"):
            current = self.model.norm(current)
        states.append(current)
        for depth in self.stage.mtp:
            embedding = self.model.embed_tokens(labels_BMS[:, depth])
            index = self.config.num_hidden_layers + depth
            states.append(self._layer(index, step, places, routed[depth + 1], states[-1], embedding))
        return states

    def _layer(self, index: int, step: StepContext, places: Places, routed_BS: torch.Tensor | None,
               *states: torch.Tensor) -> torch.Tensor:
        out, stats = self.runs[str(index)](self.model.layers[str(index)], *states, places, step.num_sequences,
                                           routed_BS)
        step.tally.add_stats(f"model.layers.{index}.mlp", stats)
        return out

    def logits(self, state_BSH: torch.Tensor) -> torch.Tensor:
        """This rank's part of the vocabulary, [B, S, v], of the whole sequence."""
        return self.head.logits(state_BSH)

    def loss(self, states: list[torch.Tensor], labels_BMS: torch.Tensor, label_mask_BMS: torch.Tensor,
             step: StepContext, sources_BK: torch.Tensor | None = None) -> torch.Tensor:
        """lm_loss + mtp_loss_scale / depth * sum of the MTP losses: this micro-batch's contribution to each."""
        total = states[0].new_zeros((), dtype=torch.promote_types(states[0].dtype, torch.float32))
        for depth, state in enumerate(states):
            loss_BS, mask_BS = -self.head.log_probabilities(state, labels_BMS[:, depth]), label_mask_BMS[:, depth]
            loss = (loss_BS * mask_BS).sum() / max(step.num_labels[depth], 1)
            step.tally.add_loss(depth, loss)
            if depth == 0 and sources_BK is not None:
                step.tally.add_sources(sources_BK, loss_BS, mask_BS)
            total = total + (loss if depth == 0 else loss * self.mtp_loss_scale / (len(states) - 1))
        return total


def shifted_labels(labels_BS: torch.Tensor, mask_BS: torch.Tensor, mtp_depth: int,
                   documents_BS: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and their mask for the main prediction and each MTP depth, [B, M, S] each.

    Depth k predicts the label k places further on; the last k positions have none. Made on whole sequences, before
    any of them is divided over ranks. The input token of depth k at position i is the label of depth k - 1 there;
    where it is of another document than token i (`documents_BS` given), the depth has no label.
    """
    labels, masks, shifted_BS = [labels_BS], [mask_BS], mask_BS
    for depth in range(1, mtp_depth + 1):
        labels.append(F.pad(labels[-1][:, 1:], (0, 1)))
        shifted_BS = F.pad(shifted_BS[:, 1:], (0, 1))
        masks.append(shifted_BS if documents_BS is None else shifted_BS & _stays(documents_BS, depth))
    return torch.stack(labels, 1), torch.stack(masks, 1)


def routed_tokens(real_BS: torch.Tensor, mtp_depth: int, documents_BS: torch.Tensor | None = None) -> torch.Tensor:
    """Which positions go to routed experts and count for their balance, [B, M, S] bool.

    Of the main model every token that is `real_BS`, no padding, whether its label counts or not. Of depth k those whose
    input, the token k places further on, is there, real, and of the same document: so not the last k positions.
    What is left out has no label, and comes after everything in its document that has one.
    """
    routed = [real_BS]
    for depth in range(1, mtp_depth + 1):
        ahead_BS = F.pad(real_BS[:, depth:], (0, min(depth, real_BS.shape[1])))
        both_BS = real_BS & ahead_BS
        routed.append(both_BS if documents_BS is None else both_BS & _stays(documents_BS, depth))
    return torch.stack(routed, 1)


def _stays(documents_BS: torch.Tensor, depth: int) -> torch.Tensor:
    """Whether the token `depth` places further on is of the same document."""
    return documents_BS == F.pad(documents_BS[:, depth:], (0, min(depth, documents_BS.shape[1])), value=-1)
