"""The texts of a JSON document, or of a table's row, under the keys of --json-keys."""

import itertools

from megatron_deepseek.data.preprocess.long_text import BadDocument, LongText

_MOST_NAMES = 20  # of the keys that a message lists


def texts_of(document: dict, keys: tuple[str, ...], names: list[str] | None = None) -> tuple:
    """Return the text of each key. A key with dots that the document lacks is a path: `meta.text` is text within meta.

    Raise BadDocument where one is missing or no text; the message lists `names`, by default the document's own keys.
    """
    return tuple(_text_of(document, key, names) for key in keys)


def _text_of(document: dict, key: str, names: list[str] | None):
    value = document[key] if key in document else _follow(document, key, names)
    parts = value if isinstance(value, list) else (value,)
    for part in parts:
        if isinstance(part, str):
            _check_surrogates(part, key)
        elif not isinstance(part, LongText) or part is not value:
            what = "a long text in a list" if isinstance(part, LongText) else f"a value of type {type(part).__name__}"
            raise BadDocument("not text", f"key {key!r} holds {what}, not text")
    return value


def _follow(document: dict, key: str, names: list[str] | None):
    value, path = document, []
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise BadDocument("missing key", _missing(key, path, names if value is document and names else value))
        path.append(name)
        value = value[name]
    return value


def _missing(key: str, path: list[str], there) -> str:
    """Return the message for a missing key; `there` is the value at `path`: a dict, a list of names, or another."""
    owner = repr(".".join(path)) if path else "it"
    if not isinstance(there, (list, dict)):
        return f"no key {key!r} (--json-keys); {owner} is no object but a {type(there).__name__}"
    names = [*map(repr, itertools.islice(there, _MOST_NAMES)), *["..."] * (len(there) > _MOST_NAMES)]
    return f"no key {key!r} (--json-keys); {owner} has {', '.join(names) or 'none'}"


def _check_surrogates(text: str, key: str):
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument("half a surrogate pair",
                          f"key {key!r} holds half a surrogate pair, which UTF-8 cannot encode: {error}") from error
