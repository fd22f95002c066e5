"""The engine: requests in, answers out, many at a time.

    engine = Engine(model, EngineSettings(max_length=4096))
    for outputs in engine.generate(["Once upon a time"], SamplingParameters(max_tokens=64)):
        print(outputs[0].text)

or step by step, as a server does: `add` a request at any time, call `step` while `has_work`, `abort` what is no longer
wanted. A step is one forward of the model over whatever the scheduler chose, then one token, or with accepted drafts
several, for each answer that has all its tokens computed.
"""

import random
from collections.abc import Sequence as Sequences

import torch

from megatron_deepseek.inference.answers import output_of
from megatron_deepseek.inference.batch import Piece
from megatron_deepseek.inference.blocks import BlockPool
from megatron_deepseek.inference.choices import Choices
from megatron_deepseek.inference.constraint import Constraints
from megatron_deepseek.inference.forward import InferenceModel
from megatron_deepseek.inference.loaded_model import LoadedModel, check_length
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.readings import Readings
from megatron_deepseek.inference.request import Numbers, PromptReading, Request, Sequence
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.scheduler import Scheduler, Span
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.inference.speculative import DraftCounts, Drafter
from megatron_deepseek.inference.statistics import Statistics
from megatron_deepseek.inference.stop_strings import StopStrings
from megatron_deepseek.inference.text import AnswerText, prompt_ids

Prompt = str | Sequences[int]
_WARM_UP = 64  # tokens of the longest forward before the first request


class Engine:
    """Answers requests with one model, or with this rank's part of it.

    In `lockstep` every step makes the same forwards whatever this rank has to do, since experts are on other ranks.
    """

    def __init__(self, model: LoadedModel, settings: EngineSettings, lockstep: bool = False):
        check_length(model, settings)
        self.loaded, self.settings, self.lockstep = model, settings, lockstep
        self.model = InferenceModel(model, settings)
        self.pool = BlockPool(self.model.num_blocks)
        self.scheduler = Scheduler(settings, self.pool)
        self.drafter = Drafter(self.model) if settings.draft_tokens else None
        self.drafts = DraftCounts.zeros(settings.draft_tokens)
        self.readings = Readings(self.model)
        self._requests: dict[str, list[Sequence]] = {}
        self._num_ids = model.config.vocab_size  # the rows that may be chosen: an embedding may be padded
        if model.tokenizer is not None:
            self._num_ids = min(self._num_ids, model.tokenizer.vocab_size)
        self._constraints = Constraints(model.tokenizer, self._num_ids)
        self._arrivals = self._prompt_tokens = self._output_tokens = self._shared_tokens = 0

    def generate(self, prompts: Sequences[Prompt], parameters: SamplingParameters | Sequences[SamplingParameters]
                 ) -> list[list[Output]]:
        """Return the n answers to each prompt, in order; `parameters` are for all prompts or one for each.

        Requests that were added before go on meanwhile, and what they give in these steps is not returned.

        Raise ValueError, before anything is computed, for a prompt or parameters that cannot be.
        """
        each = [parameters] * len(prompts) if isinstance(parameters, SamplingParameters) else list(parameters)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} sampling parameters for {len(prompts)} prompts")
        checked = [self.check(prompt, one) for prompt, one in zip(prompts, each)]
        names = [self._add(ids, one, None) for ids, one in zip(checked, each)]
        try:
            finished = self._until_finished(set(names), sum(one.n for one in each))
        except BaseException:  # Ctrl-C in a notebook, after which the engine is used again
            for name in names:
                self.abort(name)
            raise
        return [[finished[name, index] for index in range(one.n)] for name, one in zip(names, each)]

    def _until_finished(self, names: set[str], number: int) -> dict[tuple[str, int], Output]:
        """Step until there are `number` finished answers to these requests; return them by name and index."""
        finished = {}
        while len(finished) < number:
            for output in self.step_to_ends():
                if output.request_id in names:
                    finished[output.request_id, output.index] = output
        return finished

    def add(self, prompt: Prompt, parameters: SamplingParameters, request_id: str | None = None) -> str:
        """Let a request wait for its turn, and return its name.

        Raise ValueError for a prompt or parameters that cannot be, and for a name that is in use.
        """
        return self._add(self.check(prompt, parameters), parameters, request_id)

    def step(self) -> list[Output]:
        """Compute what comes next, and return the answers that got tokens."""
        return [output_of(sequence) for sequence in self._compute()]

    def step_to_ends(self) -> list[Output]:
        """Compute what comes next, and return the answers that are finished: of others nothing is copied."""
        return [output_of(sequence) for sequence in self._compute() if sequence.finish_reason is not None]

    @torch.inference_mode()
    def _compute(self) -> list[Sequence]:
        """Compute what comes next, and return the answers that got tokens."""
        spans = self.scheduler.schedule()
        if not spans and not self.lockstep:
            return []
        chosen = {} if any(span.sequence.parameters.chosen_experts for span in spans) else None
        batch = self.model.batch([span.piece for span in spans])
        states_TH = self.model.states(batch, chosen)
        self.readings.experts.keep(batch, chosen)
        self.readings.read_prompts(spans, batch.rows, states_TH)
        ready = [(span, row) for span, row in zip(spans, batch.rows) if span.samples]
        self._sample([(span, row) for span, row in ready if span.sequence.parameters.max_tokens], states_TH)
        for span, _ in ready:
            if not span.sequence.parameters.max_tokens:
                self._finish_unanswered(span.sequence)
        for span in spans:
            self._advance(span)
        running = [span.sequence for span in spans if span.sequence.finish_reason is None]
        if self.drafter is not None:
            self.drafter.draft(running, self.lockstep)
        return [span.sequence for span, _ in ready]

    def abort(self, request_id: str) -> list[Output]:
        """Stop a request and free what it holds; return what there is of its answers. An unknown name is ignored."""
        outputs = []
        for sequence in self._requests.pop(request_id, ()):
            if sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                self.readings.read_experts(sequence)
                self.scheduler.remove(sequence)
                outputs.append(output_of(sequence))
        return outputs

    def weights_changed(self) -> None:
        """Forget what was made of the weights: to be called when they have changed, while no request runs."""
        assert not self.has_work, "a request has been computed with other weights"
        self.pool.forget()
        self.model.weights_changed()

    def prepare_grammars(self) -> None:
        """Do now what the first request with a grammar would wait for; where grammars cannot be, nothing."""
        self._constraints.prepare()

    def warm_up(self) -> None:
        """Run forwards of one token, of two and of a prompt, so that no request waits for what is compiled for them.

        Every rank calls it, before the first request.
        """
        longest = min(self.settings.token_budget, self.settings.max_length, _WARM_UP)
        blocks = self.pool.allocate(-(-longest // self.settings.block_size))
        for number in (1, 2, longest):
            batch = self.model.batch([Piece([0] * number, blocks, 0)])
            self.model.logits(self.model.states(batch), [0])
            for depth in range(1, 1 + self.model.num_depths):
                self.model.depth_states(depth, batch)
        self.pool.release(blocks)

    @property
    def has_work(self) -> bool:
        """Return whether any request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def statistics(self) -> Statistics:
        """Return what the engine has done so far, and holds now."""
        return Statistics(
            running=len(self.scheduler.running), waiting=len(self.scheduler.waiting),
            prompt_tokens=self._prompt_tokens, output_tokens=self._output_tokens,
            preemptions=self.scheduler.preemptions, blocks_used=self.pool.used, blocks=self.pool.num_blocks,
            shared_tokens=self.scheduler.shared_tokens, drafts_proposed=tuple(self.drafts.proposed),
            drafts_accepted=tuple(self.drafts.accepted))

    def check(self, prompt: Prompt, parameters: SamplingParameters) -> tuple[int, ...]:
        """Return the prompt's ids; raise ValueError, of one line, if it or the parameters do not fit the model."""
        tokenizer = self.loaded.tokenizer
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("a prompt is text, and the model was loaded without a tokenizer: give token ids")
            prompt = prompt_ids(tokenizer, prompt)
        ids = tuple(prompt)
        if not ids:
            raise ValueError("a prompt is empty: it must have at least one token")
        odd = next((each for each in ids if isinstance(each, bool) or not isinstance(each, int)), None)
        if odd is not None:
            raise ValueError(f"a prompt has {odd!r}, which is no token id")
        if len(ids) > self.settings.max_length + (-1 if parameters.max_tokens else 1):  # a last one that is only read
            raise ValueError(f"a prompt has {len(ids)} tokens, and max_length {self.settings.max_length} must leave "
                             "room for one more")
        for what, given in (("a prompt", ids), ("logit_bias", parameters.logit_bias),
                            ("stop_token_ids", parameters.stop_token_ids)):
            wrong = next((each for each in given if not 0 <= each < self._num_ids), None)
            if wrong is not None:
                whose = "model's vocab_size" if tokenizer is None else "tokenizer's number of ids"
                raise ValueError(f"{what} has the token id {wrong}, and the {whose} is {self._num_ids}")
        if parameters.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and the model was loaded without one")
        if parameters.grammar is not None:
            self._constraints.check(parameters.grammar)
        return ids

    def _add(self, prompt: tuple[int, ...], parameters: SamplingParameters, request_id: str | None) -> str:
        self._arrivals += 1
        request_id = request_id or f"request-{self._arrivals}"
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use")
        ends = frozenset((*parameters.stop_token_ids, *(() if parameters.ignore_eos else self.loaded.eos_ids)))
        stop = StopStrings(parameters.stop) if parameters.stop else None
        seed = random.SystemRandom().getrandbits(63) if parameters.seed is None else parameters.seed
        reading = PromptReading.begin(min(parameters.prompt_logprobs_from, len(prompt)))
        request = Request(request_id, self._arrivals, prompt, parameters, ends, stop, seed, reading)
        sequences = [self._sequence(request, index) for index in range(parameters.n)]
        self._requests[request_id] = sequences
        for sequence in sequences:
            self.scheduler.add(sequence)
        self._prompt_tokens += len(prompt)
        return request_id

    def _sequence(self, request: Request, index: int) -> Sequence:
        tokenizer = self.loaded.tokenizer
        text = None if tokenizer is None else AnswerText(tokenizer, request.prompt, request.stop_strings)
        numbers = Numbers((request.seed + index) % 2**63)
        constraint = self._constraints.constraint(request.parameters.grammar, request.ends)
        tokens = list(request.prompt if request.parameters.max_tokens else request.prompt[:-1] or request.prompt)
        return Sequence(request, index, tokens, numbers, text, constraint)

    def _sample(self, sampling: list[tuple[Span, int]], states_TH: torch.Tensor) -> None:
        """Choose the next tokens of each sequence: one, and one more for each draft that is what was chosen."""
        rows, owners = [], []
        for span, row in sampling:
            begin = len(rows)
            rows += range(row + len(span.sequence.tokens) - 1 - span.begin, row + span.length)
            owners.append((span.sequence, range(begin, len(rows))))
        if not rows:
            return
        logits_RV = self.model.logits(states_TH, rows)
        choices = Choices.of(logits_RV[:, :self._num_ids], owners)
        for sequence, own in owners:
            self._verify(sequence, own, logits_RV, choices)

    def _verify(self, sequence: Sequence, rows: range, logits_RV: torch.Tensor, choices: Choices) -> None:
        """Append what is chosen from the rows of a sequence, as long as drafts are right."""
        drafts, accepted = sequence.drafts[:len(rows) - 1], 0
        for place, row in enumerate(rows):
            choice = choices(row, sequence)
            sequence.append(choice.token)
            self._output_tokens += 1
            self.readings.read_token(sequence, logits_RV[row], choice)
            self._finish(sequence, choice.token)
            right = place < len(drafts) and drafts[place] == choice.token
            accepted += right
            if not right or sequence.finish_reason is not None:
                break
        self.drafts.add(len(drafts), accepted)
        sequence.drafts = []

    def _finish(self, sequence: Sequence, token: int) -> None:
        """Set why a sequence is finished, if it is, and add the token to its text unless it ends it."""
        parameters, may_stop = sequence.parameters, sequence.num_answered >= sequence.parameters.min_tokens
        if token in sequence.request.ends:
            sequence.finish_reason = "stop"
            of_model = not parameters.ignore_eos and token in self.loaded.eos_ids  # whatever else the request ends with
            sequence.stop_reason = None if of_model else token
        elif sequence.text is not None and sequence.text.add(token, may_stop):
            sequence.finish_reason, sequence.stop_reason = "stop", sequence.text.stop_string
        elif sequence.constraint is not None and sequence.constraint.failed:
            sequence.finish_reason = "abort"
        elif sequence.constraint is not None and sequence.constraint.complete:
            sequence.finish_reason = "stop"
        elif sequence.num_answered >= parameters.max_tokens or len(sequence.tokens) >= self.settings.max_length:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None and sequence.text is not None and not sequence.text.finished:
            sequence.text.end()

    @staticmethod
    def _finish_unanswered(sequence: Sequence) -> None:
        """Finish a sequence of which the prompt alone was to be read."""
        sequence.finish_reason = "length"
        if sequence.text is not None:
            sequence.text.end()

    def _advance(self, span: Span) -> None:
        """Take note of what was computed, and let go of what is finished."""
        sequence = span.sequence
        self.scheduler.advance(sequence, span.kept)
        if sequence.finish_reason is not None:
            self.readings.read_experts(sequence)
            self.scheduler.remove(sequence)
            self._forget_finished(sequence.request.request_id)

    def _forget_finished(self, request_id: str) -> None:
        if all(each.finish_reason is not None for each in self._requests.get(request_id, ())):
            self._requests.pop(request_id, None)
