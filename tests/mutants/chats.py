"""Mistakes in answers that keep to a grammar, and in what chat requests and their answers mean."""

from mutant import of

GRAMMAR = ("tests/unit/inference/test_grammar.py",)
ANSWERS = ("tests/unit/serving/test_chat_answers.py",)
RENDERING = ("tests/unit/serving/test_chat_rendering.py",)

CHATS = of(
    GRAMMAR,
    ("Sequence.append", "self.constraint.add(token)", "self.constraint.add(self.tokens[-2])"),
    ("is_adjusted", " or sequence.constraint is not None", ""),
    ("_constrained", "return masked_V if masked_V.isfinite().any() else raw_V", "return masked_V if True else raw_V"),
    ("Constraint.allowed", "allowed_V[self._ends] = self._matcher.is_accepting()", "pass"),
    ("Constraint.allowed", "not self._grammar.must_begin", "True"),
    ("Constraint.add", "self._begun = token == self._grammar.begins_after", "self._begun = True"),
    ("Constraints.constraint", ".deep_copy()", ""),
    ("Constraints._words", 'token["special"] = True', "pass"),
    ("Engine._finish", 'sequence.constraint.complete:\n            sequence.finish_reason = "stop"',
     'sequence.constraint.complete:\n            sequence.finish_reason = None'),
) + of(
    ANSWERS,
    ("AnswerParser._pieces", "if name is not None and piece.endswith(name)", "if name is not None"),
    ("AnswerParser._pieces", "end > settled and (name is not None or", "end > settled and (False or"),
    ("_Reader._take_settled", '            text = text.rstrip("\\n")\n', "            pass\n"),
    ("_Reader._take_settled", "            text = text[:len(text) - _begun(text, END_THINK)]\n", "            pass\n"),
    ("_Reader._end_reasoning", "self._leads, self._state = \"\", True,", "self._leads, self._state = \"\", False,"),
    ("_Reader._in_calls", "self._num_calls, self._calls", "_, self._calls"),
    ("CallReader._more", "if self.form == FENCED else len(self._held)", ""),
    ("CallReader._first_brace", 'not begun.startswith("{")', "False"),
    ("CallReader._between", "            yield from self._as_text()\n", "            pass\n"),
    ("CallReader._close", "        self.index += 1\n", ""),
    ("Question.sampling", 'begin: float("-inf")', "begin: 0.0"),
    ("Question.parser", "        if not self.tools.shown:\n", "        if False:\n"),
    ("forced_calls._calls", "if tools.parallel else", "if True else"),
    ("strict_calls", "must_begin=False", "must_begin=True"),
) + of(
    RENDERING,
    ("WrittenTokens.encode", "if place % 2 else", "if False else"),
    ("WrittenTokens.mark", '.replace(_BEGIN, "").replace(_END, "")', ""),
    ("JinjaTemplate._message", 'seen["content"] = None', "pass"),
    ("JinjaTemplate._message", 'and "is string" not in self.source', "and False"),
    ("JinjaTemplate.render", "text.rindex(_CONTINUED)", "len(text)"),
    ("_in_order", "sorted(results, key=lambda each: each[0])]\n        results", "results]\n        results"),
    ("FamilyTemplate._continued", "if last.reasoning is None or last.content", "if True"),
    ("family.FamilyTemplate.render", "messages = self.written.mark(messages)", "messages = list(messages)"),
    ("_Rendering._assistant", 'self.before != "tool"', "True"),
    ("with_tools_text", 'told[last]["content"] += ', 'told[last]["content"] = '),
    ("_thinking", "effort != \"none\"", "True"),
)
