"""The chat page's files, without a browser: they fit together, and break no rule that the server's headers set.

What the page does is tried in Chromium by `make test-browser`.
"""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import megatron_deepseek.serving.page as page_module

FOLDER = Path(page_module.__file__).parent / "page"
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.iterdir())}
INDEX = TEXTS["index.html"]
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML")
WRITES_HTML = (r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|"
               "createContextualFragment|srcdoc")


class Elements(HTMLParser):
    """The page's elements as (tag, attributes), and which of the fields stand in a label."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.labelled, self.depth = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.depth += tag == "label"
        if self.depth:
            self.labelled.append(dict(attributes))

    def handle_endtag(self, tag):
        self.depth -= tag == "label"


ELEMENTS = Elements(INDEX)


def test_every_file_is_used_and_is_there():
    """Each by the page, or by a module that the page reads."""
    by_index = set(re.findall(r'(?:src|href)="page/([\w.]+)"', INDEX))
    imported = {name for text in SCRIPTS.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert by_index | imported == set(TEXTS) - {"index.html"}


def test_what_modules_import_is_exported():
    for name, text in SCRIPTS.items():
        for names, source in re.findall(r'import \{([^}]*)\} from "\./([\w.]+)"', text):
            exported = set(re.findall(r"^export (?:async )?(?:function\*?|const|class) (\w+)", TEXTS[source], re.M))
            assert {each.strip() for each in names.split(",")} <= exported, (name, source)
            used = text.replace(f"import {{{names}}}", "")
            assert all(re.search(rf"\b{each.strip()}\b", used) for each in names.split(",")), (name, names)


def test_nobody_else_is_asked():
    for name, text in TEXTS.items():
        code = re.sub(r"^\s*//.*$", "", text, flags=re.M)
        addresses = [each for each in re.findall(r"https?://[\w.]+[\w./]*", code) if each not in NAMESPACES]
        assert not addresses, (name, addresses)
        assert not re.search(r"@import|url\((?!['\"]?data:)", text), name


def test_no_text_becomes_markup():
    for name, text in SCRIPTS.items():
        assert not re.search(WRITES_HTML, text), name


def test_nothing_is_inline():
    """The Content-Security-Policy lets no script or style stand in the page, and no handler in an attribute."""
    assert "<style" not in INDEX and not re.search(r"<script(?![^>]*\bsrc=)", INDEX)
    names = [name for _, attributes in ELEMENTS.found for name in attributes]
    assert not [name for name in names if name == "style" or name.startswith("on")]
    assert not re.search(r'setAttribute\("style"|style: ["`]', "".join(SCRIPTS.values()))


def test_elements_that_modules_look_for_are_there_once():
    ids = Counter(attributes["id"] for _, attributes in ELEMENTS.found if "id" in attributes)
    assert not [name for name, number in ids.items() if number > 1]
    wanted = {name for text in SCRIPTS.values() for name in re.findall(r'byId\("([\w-]+)"\)', text)}
    wanted |= {f"icon-{name}" for text in SCRIPTS.values() for name in re.findall(r'icon(?:Button)?\("([\w-]+)"', text)}
    wanted |= {name for _, attributes in ELEMENTS.found for name in (
        *attributes.get("aria-labelledby", "").split(), *attributes.get("aria-describedby", "").split(),
        *attributes.get("aria-controls", "").split()) if name}
    wanted |= set(re.findall(r'href="#([\w-]+)"', INDEX))
    assert wanted <= set(ids), wanted - set(ids)


def test_every_field_has_a_name():
    for tag, attributes in ELEMENTS.found:
        if tag in ("input", "select", "textarea", "dialog", "meter"):
            named = {"aria-label", "aria-labelledby"} & set(attributes) or attributes in ELEMENTS.labelled
            assert named, (tag, attributes)


def test_modules_are_short():
    assert max(len(text.splitlines()) for text in SCRIPTS.values()) <= 320
