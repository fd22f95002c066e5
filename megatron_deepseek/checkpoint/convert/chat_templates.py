"""The chat templates of DeepSeek's released models by name, without their forms for tools, for exports.

Tests compare what each renders for system, user and assistant messages with the released template. A model knows a
template only if it was trained with it, which cannot be seen from here.
"""

from pathlib import Path

from megatron_deepseek.data.tokenizer import ASSISTANT, USER

_BEGIN = """{%- if tools %}{{ raise_exception('this template has no form for tools') }}{% endif -%}
{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] -%}
{%- set ns.first = false -%}
{%- elif message['role'] not in ('user', 'assistant') -%}
{{ raise_exception('this template has no form for the role ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
{{ (bos_token or '') + ns.system }}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ 'USER' + message['content'] }}
{%- elif message['role'] == 'assistant' -%}
{%- set answer = message['content'] -%}
""".replace("USER", USER)
_END = """{{ 'ASSISTANT' + PREFIX + answer + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT' + PROMPT }}{% endif -%}
""".replace("ASSISTANT", ASSISTANT)


def _template(answer: str, prefix: str, prompt: str) -> str:
    """Build a template.

    `answer` is Jinja code that may change an assistant's message. `prefix` and `prompt` are Jinja expressions that
    follow the assistant's token: before a message, and at the end, where the model is to answer.
    """
    return _BEGIN + answer + _END.replace("PREFIX", prefix).replace("PROMPT", prompt)


_CUT = "{%- if '</think>' in answer %}{% set answer = answer.split('</think>'CUT %}{% endif -%}\n"
_TEMPLATES = {
    "deepseek-v3": _template("", "''", "''"),
    "deepseek-r1": _template(_CUT.replace("CUT", ")[-1]"), "''", "'<think>\\n'"),
    "deepseek-v3.1": _template(_CUT.replace("CUT", ", 1)[1]"), "'</think>'",
                               "('<think>' if thinking else '</think>')"),
}
_TOKENS = {"deepseek-r1": ("<think>", "</think>"), "deepseek-v3.1": ("<think>", "</think>")}


def template_names() -> tuple[str, ...]:
    return tuple(_TEMPLATES)


def read_template(name: str) -> str:
    """Return the template of that name, or the text of the file `name`; raise ValueError if it is neither."""
    if name in _TEMPLATES:
        return _TEMPLATES[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {name} is neither one of {', '.join(_TEMPLATES)} nor a readable file: "
                         f"{error}") from error


def needed_tokens(name: str) -> tuple[str, ...]:
    """Return the texts that a named template writes and that must be single tokens; none are known of a file."""
    return (USER, ASSISTANT, *_TOKENS.get(name, ())) if name in _TEMPLATES else ()
