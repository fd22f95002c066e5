"""Where a function, method, class or constant of the package stands: by its name, whatever the file is called."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_deepseek"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Definition:
    """`file`, relative to the package, and the characters [start, end) of it, decorators and the last line end too."""

    file: str
    start: int
    end: int


def _named_nodes(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Yield what is defined at a module's or a class's level; what a function defines inside belongs to it."""
    for node in body:
        if isinstance(node, (ast.ClassDef, *_FUNCTIONS)):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _named_nodes(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((prefix + name.id, node) for target in targets for name in ast.walk(target)
                        if isinstance(name, ast.Name))


def _definitions_of(path: Path) -> Iterator[tuple[str, Definition]]:
    text, file = path.read_text(), str(path.relative_to(PACKAGE))
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for name, node in _named_nodes(ast.parse(text).body):
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
        yield name, Definition(file, starts[first - 1], starts[node.end_lineno])


@cache
def _index() -> dict[str, list[Definition]]:
    """Return the definitions by their names, alone and after the last name of their module, the last two, and so on."""
    index = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = [part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"]
        for name, definition in _definitions_of(path):
            for first in range(len(module) + 1):
                index.setdefault(".".join([*module[first:], name]), []).append(definition)
    return index


def find(name: str) -> Definition:
    """Return the only definition called `name`. Raise ValueError if there is none, or more than one."""
    found = _index().get(name, [])
    if len(found) != 1:
        places = f" (in {', '.join(each.file for each in found)}: put the module's name in front)" if found else ""
        raise ValueError(f"{len(found)} definitions are called {name}{places}")
    return found[0]
