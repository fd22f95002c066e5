"""DeepSeek-V2 and V3 with Multi-Token Prediction in plain torch: no sharding, no fusion, autograd's own backward.

Written from the papers (arXiv 2405.04434 section 2.1, 2412.19437 sections 2.1 and 2.2) with Hugging Face's weight
names and its order of eh_proj's input. It computes in the dtype of its weights. The rotary table is passed in, since
it is float32 by definition and has tests of its own.
"""

import torch
import torch.nn.functional as F
from reference_routing import balance_loss, choose, weights_of_choice

from megatron_deepseek.model.architecture.config import ModelConfig


class ReferenceModel:
    """`scores`: of each MoE layer that the last forward ran, [B, S, E] with gradient, in order. `given`: by layer the
    experts of each token, [B, S, K]; where there are none, or -1, the router chooses. `free`: as `scores`, which tokens
    it chose for.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor], rope_2SD: torch.Tensor,
                 softmax_scale: float):
        self.config, self.softmax_scale = config, softmax_scale
        self.weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        self.turn_SD = torch.complex(*rope_2SD.double())
        self.scores: list[torch.Tensor] = []
        self.free: list[torch.Tensor] = []
        self.given: dict[str, torch.Tensor] = {}

    def norm(self, x: torch.Tensor, name: str, eps: float | None = None) -> torch.Tensor:
        eps = self.config.rms_norm_eps if eps is None else eps
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def turn(self, x_SD: torch.Tensor) -> torch.Tensor:
        """RoPE: each pair of dimensions is a complex number that is turned by its position's angle."""
        pairs = torch.view_as_complex(x_SD.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turn_SD[:len(x_SD)].to(pairs.dtype)).flatten(-2)

    def attention(self, x_SH: torch.Tensor, name: str) -> torch.Tensor:
        """One sequence, a head at a time."""
        config, nope = self.config, self.config.qk_nope_head_dim
        if config.q_lora_rank is None:
            q = self.linear(x_SH, f"{name}.q_proj")
        else:
            latent = self.norm(self.linear(x_SH, f"{name}.q_a_proj"), f"{name}.q_a_layernorm", 1e-6)
            q = self.linear(latent, f"{name}.q_b_proj")
        down = self.linear(x_SH, f"{name}.kv_a_proj_with_mqa")
        latent = self.norm(down[:, :config.kv_lora_rank], f"{name}.kv_a_layernorm", 1e-6)
        kv, k_turned = self.linear(latent, f"{name}.kv_b_proj"), self.turn(down[:, config.kv_lora_rank:])
        causal = torch.ones(len(x_SH), len(x_SH), dtype=torch.bool).tril()
        heads = []
        for q, kv in zip(q.chunk(config.num_attention_heads, -1), kv.chunk(config.num_attention_heads, -1)):
            scores = q[:, :nope] @ kv[:, :nope].t() + self.turn(q[:, nope:]) @ k_turned.t()
            probabilities = (scores * self.softmax_scale).masked_fill(~causal, float("-inf")).softmax(-1)
            heads.append(probabilities @ kv[:, nope:])
        return self.linear(torch.cat(heads, -1), f"{name}.o_proj")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(gate * gate.sigmoid() * up, f"{name}.down_proj")

    def expert(self, x_H: torch.Tensor, name: str, index: int) -> torch.Tensor:
        gate, up = (self.weights[f"{name}.experts.gate_up_proj"][index] @ x_H).chunk(2)
        return self.weights[f"{name}.experts.down_proj"][index] @ (gate * gate.sigmoid() * up)

    def moe(self, x_BSH: torch.Tensor, name: str) -> torch.Tensor:
        logits = self.linear(x_BSH, f"{name}.gate")
        scores = logits.softmax(-1) if self.config.scoring_func == "softmax" else logits.sigmoid()
        self.scores.append(scores)
        bias = self.weights.get(f"{name}.gate.e_score_correction_bias")
        given = self.given.get(name, torch.full((*x_BSH.shape[:2], 1), -1))
        self.free.append((given < 0).any(-1))
        rows = []
        for x_H, scores_E, chosen in zip(x_BSH.flatten(0, 1), scores.flatten(0, 1), given.flatten(0, 1).tolist()):
            if -1 in chosen:
                chosen = choose(scores_E.tolist(), None if bias is None else bias.tolist(), self.config)
            gates = weights_of_choice(scores_E, chosen, self.config)
            rows.append(sum(gate * self.expert(x_H, name, e) for gate, e in zip(gates, chosen)))
        y_BSH = torch.stack(rows).view_as(x_BSH)
        return y_BSH + self.mlp(x_BSH, f"{name}.shared_experts") if self.config.n_shared_experts else y_BSH

    def layer(self, x_BSH: torch.Tensor, index: int) -> torch.Tensor:
        name = f"model.layers.{index}"
        normed = self.norm(x_BSH, f"{name}.input_layernorm")
        x_BSH = x_BSH + torch.stack([self.attention(x_SH, f"{name}.self_attn") for x_SH in normed])
        normed = self.norm(x_BSH, f"{name}.post_attention_layernorm")
        return x_BSH + (self.moe if self.config.is_moe_layer(index) else self.mlp)(normed, f"{name}.mlp")

    def states(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """The main model's last states, [B, S, H]."""
        self.scores, self.free = [], []
        state = self.weights["model.embed_tokens.weight"][tokens_BS]
        for index in range(self.config.num_hidden_layers):
            state = self.layer(state, index)
        return self.norm(state, "model.norm")

    def logits(self, tokens_BL: torch.Tensor, seq_length: int) -> list[torch.Tensor]:
        """Of the main model and each MTP depth k, from position i's view of tokens 0..i+k; [B, S, V] each.

        `tokens_BL` has one token more than the sequence: the last label. Positions whose token i+k lies beyond
        it take token 0, which no other position sees, since attention is causal.
        """
        head = self.weights["model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]
        embedding = self.weights["model.embed_tokens.weight"]
        states = [self.states(tokens_BL[:, :seq_length])]
        for depth in range(1, 1 + self.config.num_nextn_predict_layers):
            index = self.config.num_hidden_layers + depth - 1
            name, later = f"model.layers.{index}", F.pad(tokens_BL, (0, depth))[:, depth:depth + seq_length]
            joined = torch.cat([self.norm(embedding[later], f"{name}.enorm"),
                                self.norm(states[-1], f"{name}.hnorm")], -1)
            states.append(self.norm(self.layer(self.linear(joined, f"{name}.eh_proj"), index),
                                    f"{name}.shared_head.norm"))
        return [state @ head.t() for state in states]

    def losses(self, tokens_BL: torch.Tensor, mask_BS: torch.Tensor) -> list[torch.Tensor]:
        """Mean cross-entropy of each depth over its own valid labels: depth k at position i predicts token i+k+1."""
        batch, seq_length = mask_BS.shape
        losses = []
        for depth, logits in enumerate(self.logits(tokens_BL, seq_length)):
            terms = [F.cross_entropy(logits[b, i], tokens_BL[b, i + depth + 1])
                     for b in range(batch) for i in range(seq_length - depth) if mask_BS[b, i + depth]]
            losses.append(sum(terms) / len(terms))
        return losses

    def balance_loss(self, tails: bool = True, **alphas: float) -> torch.Tensor:
        """Of the last forward: sum over layers of the mean over sequences. Without `tails`, an MTP module of depth k
        leaves out the last k positions, which have no label.
        """
        depths = [0] * (len(self.scores) - self.config.num_nextn_predict_layers)
        depths += [0 if tails else 1 + depth for depth in range(self.config.num_nextn_predict_layers)]
        return sum(balance_loss(scores_TE[:len(scores_TE) - depth][free_T[:len(scores_TE) - depth]], self.config,
                                **alphas) / len(scores)
                   for scores, free, depth in zip(self.scores, self.free, depths)
                   for scores_TE, free_T in zip(scores, free))

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(weight) if weight.grad is None else weight.grad
                for name, weight in self.weights.items() if not name.endswith("e_score_correction_bias")}
