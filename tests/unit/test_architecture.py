"""docs/architecture.md and docs/glossary.md against the code: arrows, files, functions, and every pipeline schedule."""

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

import pytest
from schedule_pictures import blocks, held_at_most, picture, steps_of, timeline, torch_acts

from megatron_deepseek.parallel.schedule_rules import SCHEDULES, VIRTUAL_STAGES
from megatron_deepseek.planning.actions import STEPS, place_of

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_deepseek"
PAGES = [ROOT / "docs" / "architecture.md", ROOT / "docs" / "glossary.md"]
PAGE = PAGES[0].read_text()
BLOCKS = blocks(PAGE)

Arrow = tuple[str, str]


# The floors -----------------------------------------------------------------------------------------------------------

WITHOUT_TORCH = ("layout", "layout_string", "schedule_rules")  # files of parallel/


def floor_of(file: Path) -> str:
    """Return the node of the picture that `file` is in."""
    if not file.is_relative_to(PACKAGE):
        return "entries"
    inside = file.relative_to(PACKAGE)
    if len(inside.parts) == 1:
        return inside.stem if inside.stem in ("device", "library", "settings", "torch_private") else "common"
    if inside.parts[:2] == ("model", "architecture"):
        return "architecture"
    return "layout" if inside.parts[0] == "parallel" and inside.stem in WITHOUT_TORCH else inside.parts[0]


def file_of(module: str) -> Path | None:
    """Return the file of a module of the package, None for what is no module; of the package itself, None as well."""
    path = ROOT.joinpath(*module.split("."))
    found = [each for each in (path.with_suffix(".py"), path / "__init__.py", path) if each.exists()]
    return found[0] if found and path != PACKAGE else None


def imported(file: Path) -> set[Path]:
    """Return the files of the package that `file` imports when it runs, anywhere in it."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_deepseek"):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules += [name if file_of(name) else node.module for name in inner]
    ours = (file_of(module) for module in modules if module.split(".")[0] == "megatron_deepseek")
    return {each for each in ours if each is not None}


@functools.cache
def arrows_of_the_code() -> frozenset[Arrow]:
    files = [*ROOT.glob("*_deepseek.py"), *ROOT.glob("train_*.py"), *ROOT.glob("tools/*.py"), *PACKAGE.rglob("*.py")]
    return frozenset((floor_of(file), floor_of(other)) for file in files if file != PACKAGE / "__init__.py"
                     for other in imported(file) if floor_of(file) != floor_of(other))


def arrows_of_the_picture() -> set[Arrow]:
    """Return the arrows; "a --> b & c" is two."""
    (lines,) = re.findall(r"^```mermaid\nflowchart TD\n(.*?)^```", PAGE, re.M | re.S)
    found = re.findall(r"^ *(\w+)(?:\[.*\])? --> ([\w &]+)$", lines, re.M)
    return {(source, target) for source, targets in found for target in targets.split(" & ")}


def reachable(arrows: set[Arrow]) -> dict[str, set[str]]:
    """Return all floors that come after each."""
    after = defaultdict(set)
    for source, target in arrows:
        after[source].add(target)
    grown = True
    while grown:
        sizes = {floor: len(below) for floor, below in after.items()}
        for below in [*after.values()]:
            below |= set().union(*(after[floor] for floor in [*below] if floor in after))
        grown = sizes != {floor: len(below) for floor, below in after.items()}
    return after


def test_every_arrow_of_the_picture_is_an_import():
    drawn = arrows_of_the_picture()
    assert len(drawn) > 15 and not drawn - arrows_of_the_code()


def test_every_import_goes_along_the_arrows():
    below = reachable(arrows_of_the_picture())
    assert not [arrow for arrow in arrows_of_the_code() if arrow[1] not in below[arrow[0]]]


def test_arrows_go_down():
    below = reachable(arrows_of_the_picture())
    assert not [floor for floor in below if floor in below[floor]]


def test_every_folder_is_in_the_picture():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and [*path.rglob("*.py")]}
    assert {floor for arrow in arrows_of_the_picture() for floor in arrow} == folders | {
        "architecture", "common", "entries", "device", "layout", "library", "settings",
        "torch_private"}


# Files and functions --------------------------------------------------------------------------------------------------

def exists(path: str) -> bool:
    return any((top / path).exists() for top in (PACKAGE, ROOT))


def defines(path: str, name: str) -> bool:
    """Return whether the package's file `path` defines `name`: a function, a class, a constant, or a class's."""
    body = ast.parse((PACKAGE / path).read_text()).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part or isinstance(node, ast.Assign)
                 and any(isinstance(target, ast.Name) and target.id == part for target in node.targets)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def named(page: str) -> set[tuple[str, str]]:
    """Return (file, what it defines) of: `file`: `name`, `name`; `file` (`name`); `name` (`file`)."""
    found = {(path, name) for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", page)
             for name in re.findall(r"`([\w.]+)`", names)}
    found |= set(re.findall(r"`([\w/]+\.py)` \(`([\w.]+)`", page))
    return found | {(path, name) for name, path in re.findall(r"`([A-Za-z_][\w.]*)` \(`([\w/]+\.py)`\)", page)
                    if not name.endswith(".py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    paths = set(re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|cu|cpp|h|md))`", page.read_text()))
    paths |= set(re.findall(r"`python ((?:[\w.]+/)+[\w.]+\.py)`", page.read_text()))
    assert len(paths) > 15
    assert not [path for path in paths if not exists(path)]


def test_functions_are_where_they_are_said_to_be():
    found = named(PAGE)
    assert len(found) > 30
    for path, name in found:
        assert defines(path, name), (path, name)


def test_a_life_has_ten_lines():
    for life in re.findall(r"^## The life of .*?(?=^## )", PAGE, re.M | re.S):
        rows = re.findall(r"^\| (\d+) \| (.*?) \|", life, re.M)
        assert [int(number) for number, _ in rows] == [*range(1, 11)]
        assert all(re.search(r"`[\w/]+\.py`: `[\w.]+`", where) for _, where in rows)


def test_every_kind_of_addition_has_its_files():
    table = PAGE.partition("## I want to add")[2]
    rows = dict(re.findall(r"^\| (an? [\w ]+) \| (.*) \|$", table, re.M))
    assert [*rows] == ["an argument", "an objective", "a router", "an attention", "a schedule", "an architecture field",
                       "a kernel", "a file format", "a metric"]
    assert all(len(re.findall(r"`[\w/]+\.(?:py|cu|cpp|h|md)`", files)) >= 4 for files in rows.values())


def test_the_glossary_has_forty_words_in_their_order():
    rows = re.findall(r"^\| ([^|]+) \| [A-Z][^|]*\. \| `[^|]*` \|$", PAGES[1].read_text(), re.M)
    assert len(rows) == 40 and rows == sorted(rows, key=str.lower)


# Schedules ------------------------------------------------------------------------------------------------------------

def test_every_schedule_is_on_the_page():
    assert [*BLOCKS] == [*SCHEDULES]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_steps_are_those_of_the_plans(schedule):
    """Names, actions, and how often; that torch does the same is held by tests/unit/planning/test_actions.py."""
    shown, planned = steps_of(BLOCKS[schedule]), STEPS[schedule]
    assert [(step.number, step.name, step.actions) for step in shown] == [
        (step.number, step.name, step.actions) for step in planned]
    for pp, micro_batches in ((2, 4), (3, 6), (4, 8), (4, 12)):
        for rank in range(pp):
            place = place_of(schedule, pp, VIRTUAL_STAGES[schedule], micro_batches, rank)
            assert [step.count_of(schedule, pp, micro_batches, rank) for step in shown] == [
                step.count(place) for step in planned]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_picture_is_what_torch_does(schedule):
    lines = BLOCKS[schedule]
    assert lines[1 + len(steps_of(lines)):] == picture(schedule)


@pytest.mark.parametrize("pp, micro_batches", [(2, 4), (4, 8)])
def test_idle_time_and_activations_are_the_known_ones(pp, micro_batches):
    """Idle are (p - 1)(F + B), 6 units each, where a rank has one stage, half of it where it has two (arXiv 2104.04473,
    section 2.2), and less under the zero-bubble schedules. GPipe keeps m micro-batches, 1F1B p - r.
    """
    idle, held = {}, {}
    for schedule in SCHEDULES:
        acts = torch_acts(schedule, pp, micro_batches)
        spans, end = timeline(schedule, acts)
        idle[schedule] = {end - sum(stop - start for start, stop in own) for own in spans}
        held[schedule] = [held_at_most(schedule, *each) for each in zip(acts, spans)]
    for schedule in ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B"):
        assert idle[schedule] == {6 * (pp - 1) // VIRTUAL_STAGES[schedule]}, schedule
    assert held["GPipe"] == held["LoopedBFS"] == [2 * micro_batches] * pp
    assert held["1F1B"] == [2 * (pp - rank) for rank in range(pp)]
    assert all(most < 3 * (pp - 1) for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
               for most in idle[name])
