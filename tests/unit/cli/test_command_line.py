"""What every command says to a mistaken option: one line, the option that was meant, status 2."""

import importlib
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.arguments.parser import build_parser
from megatron_deepseek.checkpoint.convert.conversion import DTYPES
from megatron_deepseek.checkpoint.convert.formats import OPEN
from megatron_deepseek.checkpoint.gguf.output import TYPES as GGUF_TYPES
from megatron_deepseek.cli import convert_checkpoint as command
from megatron_deepseek.launch.command_line import OneLineParser, proposals
from megatron_deepseek.launch.ending import BROKEN_PIPE, exit_status

ROOT = Path(__file__).parents[3]
# the module of each command, arguments with a slip, and what was meant
COMMANDS = {
    "convert": ("megatron_deepseek.cli.convert_checkpoint", ["--form", "hf"], "--from"),
    "reshard": ("megatron_deepseek.cli.reshard_checkpoint", ["reshard", "--tensor-parallel-size", "2"],
                "--tensor-model-parallel-size"),
    "preprocess": ("megatron_deepseek.cli.preprocess_data", ["--inputs", "x"], "--input"),
    "dataset": ("megatron_deepseek.cli.indexed_dataset", ["merge", "--output", "x"], "--output-prefix"),
    "generate": ("megatron_deepseek.cli.generate", ["--max-tokens", "3"], "--max-new-tokens"),
    "plot": ("megatron_deepseek.cli.plot", ["--out", "x"], "--output"),
    "operators": ("megatron_deepseek.ops.__main__", ["--hlep"], "--help"),
    "cache": ("megatron_deepseek.cli.build_data_cache", ["--datapath", "x"], "--data-path"),
    "overlap": ("megatron_deepseek.cli.trace_overlap", ["--halp"], "--help"),
    "corpus": ("megatron_deepseek.cli.make_corpus", ["--max-byte", "3"], "--max-bytes"),
    "tokenizer": ("megatron_deepseek.cli.train_tokenizer", ["--vocab_size", "3"], "--vocab-size"),
    "plan": ("megatron_deepseek.cli.plan", ["memory", "--world_size", "8"], "--world-size"),
    "rerun": ("megatron_deepseek.cli.rerun", ["--starts", "2"], "--start"),
    "tiny": ("tools.run_tiny", ["--step", "3"], "--steps")}

OPTIONS = [option for option in build_parser()._option_string_actions if option.startswith("--")]  # noqa: SLF001 (of argparse)


@pytest.mark.parametrize("typed, meant", [
    ("--train-iter", "--train-iters"), ("--train_iters", "--train-iters"), ("--Train-Iters", "--train-iters"),
    ("--tensor-parallel-size", "--tensor-model-parallel-size"), ("--tp", "--tensor-model-parallel-size"),
    ("--learning-rate", "--lr"), ("--batch-size", "--global-batch-size"), ("--warmup-iters", "--lr-warmup-iters"),
    ("--tokenizer", "--tokenizer-model"), ("--resume", "--load"), ("--seq-len", "--seq-length")])
def test_the_option_that_was_meant_is_proposed(typed, meant):
    assert meant in proposals(typed, OPTIONS)


@pytest.mark.parametrize("typed", ["--foo", "--verbose", "--transformer-impl"])
def test_nothing_is_proposed_where_nothing_is_near(typed):
    assert proposals(typed, OPTIONS) == []


def test_unknown_options_are_told_before_missing_ones():
    with pytest.raises(ValueError) as refused:
        build_parser().parse_args("--modle tiny --foo=3 --train-iters 1".split())
    assert str(refused.value) == ("--modle is no option; did you mean --model?; --foo is no option; --help lists "
                                  "them all")


def test_values_with_blanks_and_words_alone_are_no_options():
    with pytest.raises(ValueError, match="unexpected 'one' 'two'"):
        build_parser().parse_args(["--model", "tiny", "--train-iters", "1", "one", "two"])
    assert build_parser().parse_args(["--model", "--my model", "--train-iters", "1"]).model == "--my model"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_in_a_line_what_was_meant(command, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    module, arguments, meant = COMMANDS[command]
    assert importlib.import_module(module).main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert ": error: " in line and "is no option; did you mean" in line and meant in line.split("did you mean")[1]


def test_help_and_refusals_need_no_torch():
    """Its import takes longer than a reader of --help wants to wait. All commands in one process, named if they do."""
    modules = [module for name, (module, *_) in COMMANDS.items() if name != "operators"]  # those are in torch
    program = f"""import importlib, sys
for module in {modules}:
    assert importlib.import_module(module).main(["--help"]) == 0, module
    assert importlib.import_module(module).main(["--no-such-option"]) == 2, module
    assert "torch" not in sys.modules, module"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


def test_the_choices_of_a_conversion_are_those_that_it_has():
    assert sorted(OPEN) == list(command.FORMATS) and sorted(DTYPES | GGUF_TYPES) == list(command.TYPES)


def test_so_does_training(capsys):
    with pytest.raises(SystemExit) as left:
        parse_or_exit(["--modle", "tiny"], {})
    assert left.value.code == 2
    first, *mistakes = capsys.readouterr().err.splitlines()
    assert first == "pretrain_deepseek.py: error: 3 mistakes:"
    assert mistakes[0] == "  --modle is no option; did you mean --model?"
    assert "--train-iters --train-samples is required" in mistakes[1] and "data for training is missing" in mistakes[2]
    assert len(mistakes) == 3, "the model is not missing, its option is misspelt"


@contextmanager
def stdout_without_reader(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield


def test_output_that_nobody_reads_is_no_success_and_no_traceback(monkeypatch, capfd):
    """Also where the buffer has room for all of it, so that the error comes only when it is flushed."""
    with stdout_without_reader(monkeypatch):
        assert exit_status("name", lambda: print("little") or 0) == BROKEN_PIPE
    with stdout_without_reader(monkeypatch):
        assert exit_status("name", lambda: print("much " * 100_000) or 0) == BROKEN_PIPE
    assert capfd.readouterr().err == ""


def test_a_mistake_is_told_where_nobody_reads_the_output(monkeypatch, capsys):
    def fail():
        print("little")
        raise ValueError("what is wrong")

    with stdout_without_reader(monkeypatch):
        assert exit_status("name", fail) == BROKEN_PIPE
    assert capsys.readouterr().err == "name: error: what is wrong\n"


@pytest.mark.parametrize("script", ["pretrain_deepseek.py", "tools/make_corpus.py", "tools/launch.py"])
def test_help_for_a_reader_that_has_gone(script):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / script, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")


@pytest.mark.parametrize("text", ["", " ", "None", "null"])
@pytest.mark.parametrize("option", ["--save", "--load", "--data-cache-path", "--tensorboard-dir"])
def test_what_an_unset_variable_leaves_is_no_path(option, text):
    """`--save "$SAVE"` would otherwise write into the working directory, `--data-cache-path None` into None/."""
    with pytest.raises(ValueError, match=f"{option}: {text!r} is no path; without one, leave the argument out"):
        build_parser().parse_args(["--model", "tiny", "--train-iters", "1", option, text])


@pytest.mark.parametrize("arguments, line", [
    (["--explain-layout", "x"], "--explain-layout: 'x' is no whole number"),
    (["--explain-layout"], "--explain-layout: expected one argument")])
def test_layouts_of_no_number_of_ranks_are_told_in_a_line(arguments, line, capsys):
    from megatron_deepseek.arguments.explain import explain_layout

    with pytest.raises(SystemExit) as left:
        explain_layout(["--model", "tiny", "--data-path", "x", "--train-iters", "1", *arguments])
    assert left.value.code == 2 and capsys.readouterr().err == f"pretrain_deepseek.py: error: {line}\n"


@pytest.mark.parametrize("kind, text, words", [(int, "x", "'x' is no whole number"), (float, "y", "'y' is no number")])
def test_a_number_of_argparses_own_is_named_as_ours(kind, text, words):
    parser = OneLineParser()
    parser.add_argument("--much", type=kind)
    with pytest.raises(ValueError, match=f"^--much: {words}$"):
        parser.parse_args(["--much", text])


def test_a_missing_file_is_told_without_its_number(capsys):
    assert exit_status("name", lambda: open("/none/such")) == 2
    assert capsys.readouterr().err == "name: error: /none/such: No such file or directory\n"
