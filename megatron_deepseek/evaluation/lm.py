"""A model of this project as lm-eval sees one: texts in, log-likelihoods and texts out.

How texts are cut into context and continuation is lm-eval's own code (TemplateLM); what is cut from the beginning, and
where windows lie, is as its `hf` model does it, so that both give the same numbers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from megatron_deepseek.evaluation.chats import Chats
from megatron_deepseek.evaluation.generation_options import cut_at, sampling_of, stops_of
from megatron_deepseek.evaluation.questions import Answer, Continuation, EvaluatedModel, Generation, Question
from megatron_deepseek.evaluation.windows import rolling_windows


class EvaluatedLM(TemplateLM):
    """What lm-eval's evaluator asks. If it is `quiet` it shows no bar."""

    def __init__(self, model: EvaluatedModel, chats: Chats = Chats(), quiet: bool = False):
        super().__init__()
        self.evaluated, self.tokenizer, self.chats, self.quiet = model, model.tokenizer, chats, quiet

    @property
    def max_length(self) -> int:
        return self.evaluated.max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Return what a text without context follows: the beginning of a document, or else the end of one."""
        return self.tokenizer.eod if self.tokenizer.bos is None else self.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "path", type(self.tokenizer).__name__)).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Return the ids of a text, after the token that begins a document where the tokenizer asks for it."""
        ids = self.tokenizer.encode(string)
        bos = self.tokenizer.bos
        begins = add_special_tokens is not False and self.tokenizer.adds_bos and ids[:1] != [bos]
        return [bos, *ids] if begins else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether it is the likeliest; without lm-eval's own bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        questions = [Continuation(tuple(context), tuple(text)) for _, context, text in requests]
        return [(answer.log_probability, answer.greedy) for answer in self._ask(questions, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, of windows that do not overlap."""
        windows = [list(rolling_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length,
                                        self.max_length)) for request in requests]
        answers = iter(self._ask([each for one in windows for each in one], "windows of texts"))
        return [sum(next(answers).log_probability for _ in one) for one in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to the first of its `until` texts and without special tokens."""
        questions = self._generations([request.args for request in requests])
        answers = self._ask(questions, "answers")
        return [cut_at(self.tokenizer.decode(tokens, special_tokens=False), stops_of(request.args[1]))
                for request, (tokens,) in zip(requests, answers)]

    def _generations(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Generation]:
        questions, times = [], Counter()
        for context, given in asked:
            times[context] += 1  # a question that is asked again is sampled with another seed
            parameters = sampling_of(given, seed=times[context])
            room = self.max_length - parameters.max_tokens
            if room < 1:
                raise ValueError(f"a task asks for answers of {parameters.max_tokens} tokens, and the model sees "
                                 f"{self.max_length} with the question")
            questions.append(Generation(tuple(self.tok_encode(context)[-room:]), parameters))
        return questions

    def _ask(self, questions: Sequence[Question], what: str) -> list[Answer]:
        """Return the answers in order, with a bar on the way."""
        found: list[Answer | None] = [None] * len(questions)
        disabled = True if self.quiet else None
        with tqdm(total=len(questions), desc=what, unit="request", disable=disabled, dynamic_ncols=True) as bar:
            for number, answer in self.evaluated.answers(questions):
                found[number] = answer
                bar.update()
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as a text, which ends where the answer, or the rest of the last message, is to follow."""
        if self.chats.render is None:
            raise ValueError("--apply-chat-template needs a chat template, and the model has none")
        return self.chats.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return what the results call the template."""
        return self.chats.name
