"""A trained reward model, to score answers with: conversations in, a number for each out, on one process.

    model = RewardModel.open(Path("runs/reward"))
    model.scores([[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]])
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.loadable import checkpoint_directory, stored_architecture
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.finetuning.conversation import BadRow
from megatron_deepseek.finetuning.data import tokenizer_with
from megatron_deepseek.finetuning.encode import Encoder, choose_template
from megatron_deepseek.finetuning.formats import to_conversation
from megatron_deepseek.finetuning.templates import Rules
from megatron_deepseek.model.build import shape_whole
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job

TOKEN_BUDGET = 8192
_JOIN_MINUTES = 10.0


def _encoder(template: str, tokenizer_type: str, tokenizer_model: str | None) -> Encoder:
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    return Encoder(tokenizer, choose_template(template, tokenizer, tokenizer_model), Rules("as-release", False),
                   tokenizer_model or tokenizer_type)


class RewardModel:
    """A reward model with its tokenizer. `token_budget`: the most tokens of a forward, padding included, if more than
    one conversation is in it.
    """

    def __init__(self, stage: DeepseekStage, encoder: Encoder, device: torch.device,
                 token_budget: int = TOKEN_BUDGET):
        self.stage, self.encoder, self.device, self.token_budget = stage, encoder, device, token_budget

    @classmethod
    def open(cls, load: Path, step: int | None = None, *, template: str = "auto",
             tokenizer_type: str = "HuggingFaceTokenizer", tokenizer_model: str | None = None,
             dtype: torch.dtype = torch.float32, token_budget: int = TOKEN_BUDGET) -> "RewardModel":
        """Load the last checkpoint of a training, or that of `step`, or a Hugging Face directory; compute in `dtype`.

        The tokenizer is by default the one that is with the weights. Raise ValueError, of one line, for what is no
        reward model, or cannot be loaded.
        """
        directory = checkpoint_directory(load, step)
        config = stored_architecture(directory)
        if not config.reward_head:
            raise ValueError(f"--load {load} is no reward model: it predicts tokens; --objective reward trains one")
        if tokenizer_model is None and tokenizer_type == "HuggingFaceTokenizer":
            tokenizer_model = tokenizer_with(load)
        encoder = _encoder(template, tokenizer_type, tokenizer_model)
        device = choose_device()
        if not dist.is_initialized():
            join_job(device, _JOIN_MINUTES)
        stage = shape_whole(config, build_meshes(Layout(), device), config.max_position_embeddings, dtype)
        checkpoint.load_weights(directory, [stage.to_empty(device=device)])
        return cls(stage.eval().requires_grad_(False), encoder, device, token_budget)

    def scores(self, conversations: Sequence) -> list[float]:
        """Return the score of each conversation: a list of messages, or a row in any form of formats.py.

        Raise ValueError that names the first which is not one.
        """
        rows = [each if isinstance(each, dict) else {"messages": each} for each in conversations]
        encoded = self.encoder.encode([self._read(number, row) for number, row in enumerate(rows, 1)])
        for number, each in enumerate(encoded, 1):
            if isinstance(each, BadRow):
                raise ValueError(f"conversation {number}: {each}") from each
        return self.scores_of_ids([each.ids for each in encoded])

    @staticmethod
    def _read(number: int, row: dict):
        try:
            return to_conversation(row)
        except BadRow as error:
            raise ValueError(f"conversation {number}: {error}") from error

    def scores_of_ids(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the score at the last token of each text of token ids. Raise ValueError for one that is too long."""
        most, found = self.stage.config.max_position_embeddings, [0.0] * len(texts)
        for number, ids in enumerate(texts, 1):
            if not 0 < len(ids) <= most:
                raise ValueError(f"conversation {number} has {len(ids)} tokens; the model reads 1 to {most}")
        for chosen in self._batches([len(ids) for ids in texts]):
            for number, score in zip(chosen, self._forward([texts[number] for number in chosen])):
                found[number] = score
        return found

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Yield the numbers of texts of about the same length that are scored together, the longest first."""
        batch: list[int] = []
        for number in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
            if batch and lengths[batch[0]] * (len(batch) + 1) > self.token_budget:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    @torch.no_grad()
    def _forward(self, texts: list[Sequence[int]]) -> list[float]:
        """Return the scores of texts, the first of which is the longest. Padding behind a text changes nothing in it,
        as attention is causal, and goes to no expert.
        """
        lengths_B = torch.tensor([len(ids) for ids in texts])
        tokens_BS = torch.zeros(len(texts), len(texts[0]), dtype=torch.int64)
        for row_S, ids in zip(tokens_BS, texts):
            row_S[:len(ids)] = torch.tensor(ids)
        real_BMS = (torch.arange(tokens_BS.shape[1]) < lengths_B[:, None]).unsqueeze(1).to(self.device)
        labels_BMS = torch.zeros_like(tokens_BS).unsqueeze(1).to(self.device)
        rows = Rows(labels_BMS, torch.zeros(labels_BMS.shape, device=self.device))
        (state_BSH,) = self.stage.states(tokens_BS.to(self.device), MicroBatch(rows, real_BMS),
                                         StepContext(len(texts)))
        scores_BS = self.stage.head.scores(state_BSH).cpu()
        return scores_BS[torch.arange(len(texts)), lengths_B - 1].tolist()
