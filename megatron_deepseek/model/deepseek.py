"""A DeepSeek model, or the part of one that a pipeline stage holds.

Parameter names are Hugging Face's on every stage: model.embed_tokens, model.layers.N, model.norm, lm_head; MTP module k
is layer num_hidden_layers + k - 1, as in the released V3 weights. A reward model has score in place of lm_head.

Stages send each other a stack of hidden states along the batch: the main model's, and after it the state of every MTP
depth already computed. The stage with the head calls the step's objective (training/objective.py), which turns them
into one scalar: this micro-batch's contribution to the loss of the global batch.

Shapes: B batch, S sequence, H hidden, M = 1 + MTP depth predictions of each token, v local vocabulary.
"""

from collections.abc import Callable

import torch
from torch import nn

from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.architecture.base_weights import BaseSettings
from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.model.head import OutputHead, ScoreHead
from megatron_deepseek.model.layer import DecoderLayer, MTPLayer, run_layer
from megatron_deepseek.model.positions import Positions
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.model.step import MicroBatch, StepContext
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.pipeline import received
from megatron_deepseek.parallel.tensor import RMSNorm, column_linear, replicated_linear
from megatron_deepseek.parallel.vocabulary import VocabParallelEmbedding


class Trunk(nn.Module):
    """The `model.` part of the names: embedding, layers, final norm; each only where the stage has it."""

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

    forward(x, micro_batch, step): x is token ids [B, S] on the first stage and stacked states elsewhere. It returns
    stacked states, or on the last stage the step's objective of them: the micro-batch's contribution to the loss.
    """

    def __init__(self, stage: Stage, blueprint: Blueprint, seq_length: int, device: torch.device,
                 run_of: Callable[[int], Callable] = lambda position: run_layer, loss_chunk_size: int | None = None):
        """Build the stage's modules on the default device.

        `run_of` says how the layer at each position of this stage is run (layer.choose_run). `loss_chunk_size`: the
        number of tokens whose logits exist at once (head.OutputHead).
        """
        super().__init__()
        self.stage, self.config, self.tp = stage, blueprint.config, blueprint.tp
        self.overlap, self.counter = blueprint.overlap, blueprint.etp.counter
        self.lora: LoraSettings | None = None  # of the adapters beside its weights (model/lora.py)
        self.base: BaseSettings | None = None  # what its frozen weights are kept as (model/base_weights.py)
        self.held: tuple = ()  # and those that are
        self.model = Trunk(stage, blueprint)
        self.runs = {index: run_of(position) for position, index in enumerate(self.model.layers)}
        if stage.loss and self.config.reward_head:
            self.score = replicated_linear(self.config.hidden_size, 1, blueprint.tp)
            self.head = ScoreHead(self.tp, self.score)
        elif stage.loss and not self.config.tie_word_embeddings:
            self.lm_head = column_linear(self.config.hidden_size, self.config.vocab_size, blueprint.tp)
            self.head = OutputHead(self.tp, self.lm_head.local_weight, lambda: self.lm_head.gemm, loss_chunk_size)
        elif stage.loss:
            self.head = OutputHead(self.tp, self.model.embed_tokens.local_weight, chunk_size=loss_chunk_size)
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.rope_2SD = blueprint.cp.own(rope_table(self.config, seq_length, device, wide), dim=1)

    def forward(self, x: torch.Tensor, micro_batch: MicroBatch, step: StepContext) -> torch.Tensor:
        if not self.stage.holds_anything:
            return received(x).clone()  # x is a leaf, from which no gradient would come back
        states = self.states(x, micro_batch, step)
        if not self.stage.loss:
            return torch.cat(states) if len(states) > 1 else states[0].contiguous()
        rows = micro_batch.rows
        made = step.contribution(Predictions(states, self.head, rows.labels_BMS), rows)
        step.statistics.add_reports(made.reports)
        return made.loss

    def states(self, x: torch.Tensor, micro_batch: MicroBatch, step: StepContext) -> list[torch.Tensor]:
        """Return the main state and those of the MTP depths up to and with this stage, [B, S, H] each.

        There are as many MTP depths as the micro-batch has labels for.
        """
        labels_BMS = micro_batch.rows.labels_BMS
        x = self._embed(x, micro_batch) if self.stage.embedding else received(x)
        *states, current = x.split(labels_BMS.shape[0])
        positions = Positions(self.rope_2SD[:, :labels_BMS.shape[2]], micro_batch.mask, micro_batch.keys,
                              micro_batch.replay)
        routed = [None] * labels_BMS.shape[1] if micro_batch.routed_BMS is None else micro_batch.routed_BMS.unbind(1)
        for index in self.stage.layers:
            current = self._layer(index, step, positions, routed[0], current)
        if hasattr(self.model, "norm"):
            current = self.model.norm(current)
        states.append(current)
        for depth in self.stage.mtp:
            if depth + 1 < labels_BMS.shape[1]:
                embedding = self.model.embed_tokens(labels_BMS[:, depth])
                index = self.config.num_hidden_layers + depth
                states.append(self._layer(index, step, positions, routed[depth + 1], states[-1], embedding))
        return states

    def _embed(self, tokens_BS: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """Return the embeddings of the main model's input. MTP modules get theirs of the next tokens without noise."""
        x = self.model.embed_tokens(tokens_BS)
        if micro_batch.noise is None:
            return x
        return micro_batch.noise.add_to(x, self.tp.rank * x.shape[1] if self.tp.sequence_parallel else 0)

    def mtp_layers(self, from_depth: int) -> list[nn.Module]:
        """Return this stage's MTP modules of the depths from `from_depth` on, counted from 0."""
        return [self.model.layers[str(self.config.num_hidden_layers + depth)] for depth in self.stage.mtp
                if depth >= from_depth]

    def _layer(self, index: int, step: StepContext, positions: Positions, routed_BS: torch.Tensor | None,
               *states: torch.Tensor) -> torch.Tensor:
        out, stats = self.runs[str(index)](self.model.layers[str(index)], *states, positions, step.num_sequences,
                                           routed_BS)
        step.statistics.add_stats(f"model.layers.{index}.mlp", stats)
        return out

    def logits(self, state_BSH: torch.Tensor) -> torch.Tensor:
        """Return the logits of this rank's part of the vocabulary, [B, S, v], for the whole sequence."""
        return self.head.logits(state_BSH)
