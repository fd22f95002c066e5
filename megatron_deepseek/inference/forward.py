"""The model's forward over the cache: flattened tokens in, states and logits out.

It calls the layers of the training model one by one and does their attention itself, so that the training model has no
flag for inference. With tensor parallelism each rank has its heads and its part of the vocabulary; logits are gathered.

Shapes: T tokens, R rows, H hidden, V vocabulary.
"""

import torch
from torch import nn

from megatron_deepseek.inference.batch import Batch, Piece, make_batch
from megatron_deepseek.inference.cache import PagedCache, bytes_of_token, count_blocks
from megatron_deepseek.inference.gqa import CachedGQA
from megatron_deepseek.inference.loaded_model import LoadedModel
from megatron_deepseek.inference.mla import CachedMLA
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.model.attention.gqa import GroupedQueryAttention
from megatron_deepseek.model.attention.mla import MLA
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.ops.rounded_rows import compiles_for_each_shape, rounded
from megatron_deepseek.parallel.collectives import all_gather

Chosen = dict[str, torch.Tensor]


class InferenceModel:
    """A loaded model with its cache."""

    def __init__(self, model: LoadedModel, settings: EngineSettings):
        self.stage, self.config, self.device, self.dtype = model.stage, model.config, model.device, model.dtype
        self.tp, self.settings = model.stage.tp, settings
        assert not self.tp.sequence_parallel, "tokens of a step are not divided among tensor-parallel ranks"
        self.num_depths = self._depths()
        self.layers: dict[int, nn.Module] = {
            index: self.stage.model.layers[str(index)]
            for index in range(self.config.num_hidden_layers + self.num_depths)}
        self.attention = {index: self._cached(index, layer.self_attn) for index, layer in self.layers.items()}
        self.num_blocks = count_blocks(settings, bytes_of_token(self.widths, self.dtype))
        self.cache = PagedCache.make(self.widths, self.num_blocks, settings.block_size, self.dtype, self.device)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.rope_2SD = rope_table(self.config, settings.slots_of_request, self.device, wide)

    @property
    def widths(self) -> dict[str, int]:
        """Return how many numbers of a token the cache keeps, by tensor."""
        widths = {attention.name: attention.width for attention in self.attention.values()}
        kept_states = self.num_depths and self.num_depths + (self.settings.draft_tokens > self.num_depths)
        return widths | {state_name(depth): self.config.hidden_size for depth in range(kept_states)}

    def _cached(self, index: int, attention: MLA | GroupedQueryAttention) -> CachedMLA | CachedGQA:
        """Return the attention of a layer over the cache."""
        if isinstance(attention, MLA):
            return CachedMLA(attention, f"layer.{index}")
        return CachedGQA(attention, self.config, f"layer.{index}", self.config.window_of(index))

    def _depths(self) -> int:
        """Return how many MTP modules draft; raise ValueError if there is none and drafts are wanted."""
        held = self.config.num_nextn_predict_layers
        if self.settings.draft_tokens and not held:
            raise ValueError(f"draft_tokens {self.settings.draft_tokens} need a Multi-Token Prediction module, "
                             "and the model has num_nextn_predict_layers 0")
        return min(held, self.settings.draft_tokens)

    def batch(self, pieces: list[Piece]) -> Batch:
        """Return the batch of a forward of `pieces`; of no pieces, one of padding alone."""
        takes_few = next(iter(self.attention.values())).takes_few
        return make_batch(pieces, self.settings.block_size, takes_few, self.device, self._padded)

    def weights_changed(self) -> None:
        """Forget the copies that attention made of weights."""
        for attention in self.attention.values():
            attention.weights_changed()

    @torch.inference_mode()
    def states(self, batch: Batch, chosen: Chosen | None = None) -> torch.Tensor:
        """Return the final states [T, H] of the main model; keep the experts [T, K] of each layer in `chosen`."""
        x_1TH = self.stage.model.embed_tokens(batch.tokens_T.unsqueeze(0))
        rope_2TD = self.rope_2SD[:, batch.positions_T]
        for index in range(self.config.num_hidden_layers):
            x_1TH = self._layer(index, x_1TH, batch, rope_2TD, chosen)
        return self._keep(0, self.stage.model.norm(x_1TH)[0], batch)

    @torch.inference_mode()
    def depth_states(self, depth: int, batch: Batch) -> torch.Tensor:
        """Return the states [T, H] of MTP module `depth`, counted from 1; beyond the last one that is applied again.

        A token joins the state that the depth before has at the place before.
        """
        source = min(depth, self.num_depths)
        index = self.config.num_hidden_layers + source - 1
        layer, tokens_1T = self.layers[index], batch.tokens_T.unsqueeze(0)
        before_TH = self.cache[state_name(min(depth - 1, self.num_depths))].index_select(0, batch.previous_T)
        embedding_1TH = self.stage.model.embed_tokens(tokens_1T)
        x_1TH = layer.eh_proj(torch.cat([layer.enorm(embedding_1TH), layer.hnorm(before_TH.unsqueeze(0))], -1))
        x_1TH = self._layer(index, x_1TH, batch, self.rope_2SD[:, batch.positions_T], None)
        return self._keep(source, layer.shared_head.norm(x_1TH)[0], batch)

    @torch.inference_mode()
    def logits(self, states_TH: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Return the logits [R, V] of some rows, over the whole vocabulary, in at least float32."""
        padded = rows + rows[-1:] * (self._padded(len(rows)) - len(rows))
        picked = states_TH.index_select(0, torch.tensor(padded, device=self.device))
        logits_Rv = self.stage.logits(picked.unsqueeze(0))[0, :len(rows)]
        logits_RV = logits_Rv if self.tp.size == 1 else all_gather(logits_Rv.contiguous(), 1, self.tp.group)
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))

    def _layer(self, index: int, x_1TH: torch.Tensor, batch: Batch, rope_2TD: torch.Tensor, chosen: Chosen | None
               ) -> torch.Tensor:
        layer = self.layers[index]
        x_1TH = x_1TH + self.attention[index](layer.input_layernorm(x_1TH), batch, rope_2TD, self.cache)
        normed_1TH = layer.post_attention_layernorm(x_1TH)
        if not layer.is_moe:
            return x_1TH + layer.mlp(normed_1TH)
        y_1TH, stats = layer.mlp(normed_1TH, 1)
        if chosen is not None:
            experts_1TK = stats.experts_BSK
            whole = experts_1TK if self.tp.size == 1 else all_gather(experts_1TK.contiguous(), 1, self.tp.group)
            chosen[f"model.layers.{index}.mlp"] = whole[0]
        return x_1TH + y_1TH

    def _keep(self, depth: int, states_TH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Keep the states that the next depth starts from, where there is one."""
        if state_name(depth) in self.cache.tensors:
            self.cache[state_name(depth)].index_copy_(0, batch.slots_T, states_TH)
        return states_TH

    def _padded(self, tokens: int) -> int:
        """Return how many rows `tokens` tokens are padded to.

        Of shapes that kernels are compiled for there shall be few. Experts are divided among tensor-parallel ranks by
        tokens. A forward has one row at least.
        """
        tokens = max(tokens, 1)
        if compiles_for_each_shape(self.device, self.dtype):
            tokens = rounded(tokens)
        return -(-tokens // self.tp.size) * self.tp.size


def state_name(depth: int) -> str:
    """Return the name in the cache of a depth's final states; depth 0 is the main model."""
    return f"state.{depth}"
