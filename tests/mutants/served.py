"""Mistakes in the server: what it answers, whom, how much, and how it ends. A table like table.py's."""

from mutant import of

SERVED = of(
    ("tests/unit/inference/test_stop_strings.py",),
    ("AnswerText.end", "self.ends[-1] = len(self.text)", "pass"),
    ("AnswerText._take", "min(each, len(self.text))", "each"),
    ("Output.settled", "bisect_right(self.text_ends, len(self.text))", "len(self.tokens)"),
) + of(
    ("tests/unit/serving/test_completions.py",),
    ("completion_answer.Choice._logprobs", "[0, *ends[:-1], *offsets]", "[*ends, *offsets]"),
    ("completion_answer.Choice._logprobs", "[*output.prompt_log_probabilities, *values]",
     "[*output.prompt_log_probabilities[1:], None, *values]"),
    ("Choice.piece", "said[self.text:]", "said"),
    ("read_completion", "max(base.prompt_logprobs or 0, logprobs)", "0"),
    ("_ranked", "start=1", "start=0"),
) + of(
    ("tests/unit/serving/test_chats.py",),
    ("ChatChoice.pieces", "if ends else {}", "if output.finished else {}"),
    ("chat_request._LENGTHS", '"max_completion_tokens", "max_tokens"', '"max_tokens", "max_completion_tokens"'),
    ("answer_length", "usual or most", "usual or 16"),
) + of(
    ("tests/unit/serving/test_errors.py",),
    ("answer_length", "prompt + asked > most", "asked > most"),
    ("Fields.refuse_misspelt", "if near:", "if near and not known:"),
    ("from_words", 'path if found and " " not in path else param', "param"),
) + of(
    ("tests/unit/serving/test_access.py",),
    ("Access._check_key", " or not right", ""),
    ("Access._is_local", 'name.endswith(".localhost")', 'name.startswith("localhost")'),
    ("Access._is_known", "netloc.lower() == host.lower()", "netloc.startswith(host)"),
) + of(
    ("tests/unit/serving/test_service.py",),
    ("Limits.admit", "answering + number > most", "answering >= most"),
    ("Ticket.put", "self._first[output.request_id] + output.index", "output.index"),
    ("EngineThread._run", "self._loop.call_soon_threadsafe(self._failed)", "pass"),
) + of(
    ("tests/unit/serving/test_limits.py",),
    ("Service.asked", "self.engine.abort(name)", "pass"),
    ("connection_class", "self._reader_due = self.loop.call_later(limits.idle_seconds, self.transport.abort)", "pass"),
    ("connection_class", "self._headers_due = self.loop.call_later(limits.idle_seconds, self.transport.abort)", "pass"),
    ("Server.shutdown", "self._service.end", "len, ()"),
    ("body._receive", "size > limits.body_bytes:\n        raise", "size > 2 * most:\n        raise"),
) + of(
    ("tests/unit/serving/test_served_by_ranks.py",),
    ("Replicas._collect", "total([statistics for _, statistics in of_replicas])", "self.engine.statistics"),
) + of(
    ("tests/unit/serving/test_routes.py",),
    ("Watched._note", "in self.paths", "in (scope['path'],)"),
    ("Page.read", "if path.suffix in _KINDS", "if path.is_file()"),
)
