"""What an answer must be, as requests say it: response_format, vLLM's structured_outputs and its older guided_ fields.

They become a grammar. JSON may have blanks between its parts, as models write it, but few in a row: a model that has
nothing to say would write blanks for ever.
"""

import json
from collections.abc import Mapping
from typing import Any

from megatron_deepseek.inference.grammar import Grammar, need_library
from megatron_deepseek.serving.chat.fields import a_list, an_object, fault, one_of, text

BLANKS = {"whitespace_pattern": r"[ \n\t]{0,12}"}
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_GUIDED = {f"guided_{kind}": kind for kind in _KINDS}
GRAMMAR_FIELDS = ("response_format", "structured_outputs", *_GUIDED)  # of a request


def grammar_of(body: Mapping[str, Any], begins_after: int | None = None, leading: bool = False) -> Grammar | None:
    """Return the grammar that a request asks for, None where it asks for none.

    `begins_after`: the token that ends the reasoning, where an answer begins with that; `leading`: line ends may come
    before the answer. Raise ValueError that names the field which is wrong.
    """
    found = [*_response_format(body), *_structured_outputs(body), *_guided(body)]
    if not found:
        return None
    if len(found) > 1:
        raise fault(found[1][0], f"cannot be with {found[0][0]}: an answer has one form")
    path, kind, value = found[0]
    need_library(path)
    return grammar([_body(kind, value, path) | {"name": "answer"}], "@answer", path, begins_after, leading)


def grammar(rules: list[dict[str, Any]], start: str, path: str, begins_after: int | None, leading: bool) -> Grammar:
    """Return a grammar of named `rules`, of which an answer is `start`, in Lark."""
    first = {"lark_grammar": f"start: {'/' + chr(92) + 'n{0,2}/ ' if leading else ''}{start}"}
    return Grammar(json.dumps({"grammars": [first, *rules]}, ensure_ascii=False), begins_after, path)


def json_rule(schema: Any) -> dict[str, Any]:
    """Return the rule of a JSON schema, which may be true or false too."""
    schema = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return {"json_schema": schema | {"x-guidance": BLANKS}}


def _response_format(body: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    if body.get("response_format") is None:
        return []
    path = "response_format"
    given = an_object(body[path], path)
    kind = one_of(given.get("type"), f"{path}.type", ("text", "json_object", "json_schema"))
    if kind == "text":
        return []
    if kind == "json_object":
        return [(path, "json_object", True)]
    schema = an_object(given.get("json_schema"), f"{path}.json_schema")
    if schema.get("name") is not None:
        text(schema["name"], f"{path}.json_schema.name")
    return [(f"{path}.json_schema.schema", "json", schema.get("schema"))]


def _structured_outputs(body: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    given = an_object(body.get("structured_outputs") or {}, "structured_outputs")
    wanted = [kind for kind in _KINDS if given.get(kind) not in (None, False)]
    return [(f"structured_outputs.{kind}", kind, given[kind]) for kind in wanted]


def _guided(body: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    return [(name, kind, body[name]) for name, kind in _GUIDED.items() if body.get(name) not in (None, False)]


def _body(kind: str, value: Any, path: str) -> dict[str, Any]:
    """Return the rule of one kind."""
    if kind == "json_object":
        return json_rule({"type": "object"})
    if kind == "json":
        return json_rule(_schema(value, path))
    if kind == "choice":
        choices = [text(each, f"{path}[{place}]") for place, each in enumerate(a_list(value, path))]
        if not choices or not all(choices):
            raise fault(path, "must have at least one choice, and no empty one")
        return {"lark_grammar": "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)}
    from llguidance import LLMatcher, grammar_from
    if kind == "regex":
        made = LLMatcher.grammar_from_regex(text(value, path))
    else:
        try:
            made = grammar_from("grammar", text(value, path))
        except ValueError as error:
            raise fault(path, str(error)) from error
    return json.loads(made)["grammars"][0] if made.startswith("{") else {"lark_grammar": made}


def _schema(value: Any, path: str) -> Any:
    """Return a JSON schema, which may be given as its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise fault(path, f"is no JSON: {error}") from error
    return value if isinstance(value, bool) else an_object(value, path)
