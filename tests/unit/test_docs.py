"""What the pages say is so: commands that the tools accept, files that exist, sums that come out.

A command is tried with one more option, which no tool has: it must be the only one that is refused as unknown.
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from test_examples import DATA, bash, released, settings_of, words_of  # noqa: F401 (a fixture)

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.arguments.grpo import build_grpo_parser
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.model.architecture.presets import V3
from megatron_deepseek.planning.gpus import find_gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import FITS, all_ranks, verdict, worst

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_OPTION = "--option-that-no-tool-has"
PARSERS = {"pretrain_deepseek.py": build_parser, "finetune_deepseek.py": build_finetuning_parser,
           "train_grpo.py": build_grpo_parser}
COMMANDS = {
    "tools/convert_checkpoint.py": "megatron_deepseek.cli.convert_checkpoint",
    "tools/merge_lora.py": "megatron_deepseek.cli.merge_lora",
    "tools/translate_arguments.py": "megatron_deepseek.cli.translate_arguments",
    "tools/reshard_checkpoint.py": "megatron_deepseek.cli.reshard_checkpoint",
    "tools/preprocess_data.py": "megatron_deepseek.cli.preprocess_data",
    "tools/indexed_dataset.py": "megatron_deepseek.cli.indexed_dataset",
    "tools/generate.py": "megatron_deepseek.cli.generate",
    "tools/chat.py": "megatron_deepseek.cli.chat",
    "tools/score_answers.py": "megatron_deepseek.cli.score_answers",
    "tools/sample_answers.py": "megatron_deepseek.cli.sample_answers",
    "tools/view_rollouts.py": "megatron_deepseek.cli.view_rollouts",
    "tools/serve.py": "megatron_deepseek.cli.serve",
    "tools/evaluate.py": "megatron_deepseek.cli.evaluate",
    "tools/plan.py": "megatron_deepseek.cli.plan",
    "tools/build_data_cache.py": "megatron_deepseek.cli.build_data_cache",
    "tools/train_tokenizer.py": "megatron_deepseek.cli.train_tokenizer",
    "tools/trace_overlap.py": "megatron_deepseek.cli.trace_overlap",
    "tools/plot_metrics.py": "megatron_deepseek.cli.plot",
    "megatron_deepseek.cli.plot": "megatron_deepseek.cli.plot",
    "tools/make_corpus.py": "megatron_deepseek.cli.make_corpus",
    "tools/make_conversations.py": "megatron_deepseek.cli.make_conversations",
    "tools/run_tiny.py": "tools.run_tiny"}
FROM_HERE = ("quickstart_cluster.md", "r1.md")  # whose commands are tried whole


def lines_of_code(page: Path) -> list[str]:
    """The lines of a page's blocks, continued ones joined, comments cut."""
    text = "\n".join(re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in text.splitlines()]


def words_of_line(line: str) -> list[str]:
    try:
        return [word for word in shlex.split(line) if word not in ("...", "[arguments]")]
    except ValueError:
        return []


def commands(page: Path):
    """(name in COMMANDS or the entry, its arguments) of each line that runs one."""
    for line in lines_of_code(page):
        words = words_of_line(line)
        for place, word in enumerate(words):
            if word in COMMANDS or word.endswith(tuple(PARSERS)):
                yield word, words[place + 1:]
                break


PAGES_WITH_COMMANDS = [page for page in PAGES if list(commands(page))]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=lambda page: page.name)
def test_options_in_the_pages_exist(page, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for name, arguments in commands(page):
        if name in COMMANDS:
            assert importlib.import_module(COMMANDS[name]).main([*arguments, NO_OPTION]) == 2
        else:
            parser = PARSERS[Path(name).name]
            with pytest.raises(SystemExit):
                parse_or_exit([*arguments, NO_OPTION], {}, parser)
        error = capsys.readouterr().err
        assert re.findall(r"(--\S+) is no option", error) == [NO_OPTION], (page.name, name, arguments, error)


def test_the_pages_have_commands():
    assert {"README.md", "data.md", "conversion.md", "resharding.md", "quickstart_cluster.md", "r1.md"} <= {
        page.name for page in PAGES_WITH_COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert "://" in link or (page.parent / link).exists(), link
    for path in re.findall(r"\b((?:tools|examples|docs)/[\w./]+\.(?:py|sh|md))\b", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", FROM_HERE)
def test_scripts_are_started_as_they_want(page, released, monkeypatch):  # noqa: F811
    """Each line that runs an example, with what the lines before it export; a released model's directory stands in."""
    exported, started = {}, 0
    for line in lines_of_code(ROOT / "docs" / page):
        words = words_of_line(line)
        given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        if words[:1] == ["export"]:
            exported |= given
        script = next((word for word in words if re.fullmatch(r"examples/\w+_\w+\.sh", word)), None)
        if script is None:
            continue
        nodes = next((word.split("=")[1] for word in words if word.startswith("--nodes=")), given.get("NNODES", "1"))
        environ = {"NODE_RANK": "0", "MASTER_ADDR": "host0", "NNODES": nodes, **exported, **given, "PYTHON": "echo"}
        environ.pop("DRY_RUN", None)
        if "MODEL" in environ:
            environ["MODEL"] = released
        done = bash(str(ROOT / script), *words[words.index(script) + 1:], **environ)
        assert settings_of(words_of(done)).layout.world_size % int(nodes) == 0
        started += 1
    assert started or page == "r1.md"


def test_memory_in_the_quick_start_is_what_the_layouts_give():
    """Every number of every row is the planner's for the script's arguments, and every row fits in 80 GB."""
    rows = re.findall(r"^\| (\d+) nodes(.*?) \| PP16.*?\|(.*?)\| ([\d.]+) \| ([\d.]+) \| (\d+) to (\d+) \|",
                      page_text(), re.M)
    assert len(rows) == 7
    for nodes, more, where, states, activations, low, high in rows:
        environ = DATA | dict(word.split("=") for word in more.strip(", `").split())
        done = bash(str(ROOT / "examples/pretrain_deepseek_v3.sh"), **environ, NNODES=nodes, PYTHON="echo")
        ranks = all_ranks(Job(settings_of(words_of(done))))
        fullest, host = worst(ranks), re.search(r"host, ([\d.]+)", where)
        assert fullest.states.device / 2**30 == pytest.approx(float(states), abs=0.051), nodes
        assert fullest.activations / 2**30 == pytest.approx(float(activations), abs=0.051)
        assert (round(fullest.low / 2**30), round(fullest.high / 2**30)) == (int(low), int(high))
        assert max(rank.host for rank in ranks) / 2**30 == pytest.approx(float(host[1]) if host else 0, abs=0.051)
        assert verdict(ranks, find_gpu("h800")) == FITS


def page_text() -> str:
    return (ROOT / "docs" / "quickstart_cluster.md").read_text()


def test_sizes_of_v3_are_those_of_its_shapes():
    """docs/r1.md: what is not FP8 is embedding, head (each twice), routers, norms and eh_proj; a scale is 4 bytes."""
    page = (ROOT / "docs" / "r1.md").read_text()
    copies = 2 * V3.vocab_size * V3.hidden_size
    numbers = V3.num_parameters()
    routers = 59 * (V3.n_routed_experts * V3.hidden_size)
    wide = 2 * copies + routers + 2 * V3.hidden_size ** 2
    fp8 = (numbers + copies - wide) * (1 + 4 / 128 ** 2) + 2 * wide
    for size in (fp8, 2 * (numbers + copies), 2 * numbers, 12 * numbers):
        assert f"| {size / 1e9:,.0f} |" in page
    assert f"{(numbers + copies) / 1e9:.1f}e9 numbers" in page and f"{wide / 1e9:.1f}e9" in page


def literals() -> list[str]:
    """All texts of the source, values in them as \0: strings, f-strings, the messages of rules, lines of scripts."""
    found = []
    for path in [each for files in ("*_*.py", "tools/*.py", "megatron_deepseek/**/*.py") for each in ROOT.glob(files)]:
        for node in ast.walk(ast.parse(path.read_text())):
            text = _text(node)
            if text:
                found.append(re.sub(r"\{r\.[^}]*\}|%s", "\0", text))
    for path in ROOT.glob("examples/*.sh"):
        lines = re.sub(r'" \\\n\s*"', " ", path.read_text()).splitlines()
        found += [re.sub(r"\$\{[^}]*\}|\$\w+", "\0", line) for line in lines]
    return found


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) if isinstance(value, ast.Constant) else "\0" for value in node.values)
    return ""


def messages() -> list[str]:
    return re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)


def test_messages_of_the_troubleshooting_page_are_in_the_source():
    """The words between values, in their order, in one text; `PROGRAM: error: ` and `PROGRAM: ` are put before it."""
    texts = literals()
    assert len(messages()) > 30
    for message in messages():
        words = re.sub(r"^(\S+: )?error: |^launch\.py: |^\[rank\.\.\.\]: ", "", message).split("...")
        pattern = ".*".join(re.escape(part.strip()) for part in words if len(part.strip()) > 1)
        assert any(re.search(pattern, text, re.S) for text in texts), message


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme]
