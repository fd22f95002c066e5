"""--reward: what its values mean, and every mistake in a line, before anything is imported."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deepseek.rewards.spec import RewardSpec, parse_rewards

HERE = Path(__file__)


@pytest.mark.parametrize("text, spec", [
    ("format", RewardSpec("format", "format")),
    ("format:0.5", RewardSpec("format", "format", None, 0.5)),
    ("exact(answer=target):-1e-1", RewardSpec("exact", "exact", None, -0.1, (("answer", "target"),))),
    ("length(longest=100, soft=20)", RewardSpec("length", "length", None, 1, (("longest", 100), ("soft", 20)))),
    (r"regex(pattern=a{1,2},(b=c):d):2", RewardSpec("regex", "regex", None, 2, (("pattern", "a{1,2},(b=c):d"),))),
    ("regex(pattern=a:b)", RewardSpec("regex", "regex", None, 1, (("pattern", "a:b"),))),
    ("code(unisolated=true,seconds=0.5)",
     RewardSpec("code", "code", None, 1, (("unisolated", True), ("seconds", 0.5)))),
    (f"{HERE}:test_a_spec", RewardSpec("test_a_spec", "test_a_spec", HERE)),
    (f"{HERE}:HERE:3", RewardSpec("HERE", "HERE", HERE, 3)),
    (f"model:{HERE.parent}", RewardSpec("model", "model", HERE.parent)),
    (f"model:{HERE.parent}:0.25", RewardSpec("model", "model", HERE.parent, 0.25))])
def test_a_spec(text, spec):
    (found,) = parse_rewards([text])
    assert found == spec and pickle.loads(pickle.dumps(found)) == spec
    assert (found.is_ready, found.is_model) == (spec.path is None, text.startswith("model:"))


def test_a_model_whose_directory_ends_like_a_weight(tmp_path):
    (tmp_path / "reward:2").mkdir()
    (found, again) = parse_rewards([f"model:{tmp_path}/reward:2", f"model:{tmp_path}:2"])
    assert (found.path, found.weight, again.path, again.weight) == (tmp_path / "reward:2", 1, tmp_path, 2)


def test_equal_names_are_told_apart():
    found = parse_rewards(["regex(pattern=a)", "format", "regex(pattern=b)"])
    assert [each.name for each in found] == ["regex", "format", "regex_2"]


@pytest.mark.parametrize("text, message", [
    ("formt", "formt is none of math, format, .*, and no FILE.py:NAME; did you mean format?"),
    ("format:heavy", "the weight 'heavy' is no finite number"),
    ("format:nan", "the weight 'nan' is no finite number"),
    ("format(x=1)", "format has no option 'x'; it has none"),
    ("length", r"length needs longest, as in length\(longest=...\)"),
    ("length(longest=ten)", "longest 'ten' is no whole number"),
    ("length(longest=1,soft=2)", "soft 2 from 0 to longest 1"),
    ("code(unisolated=perhaps)", "unisolated 'perhaps' is neither true nor false"),
    ("language(language=tlh)", "language tlh is neither question nor one of en, "),
    ("regex(pattern=a[)", "no regular expression"),
    ("missing.py:f", "missing.py: No such file or directory"),
    (f"{HERE}", "behind the file stands the name of a function"),
    (f"{HERE}:test_a_spek", "defines no test_a_spek; it has test_a_spec"),
    (f"{HERE}:HERE:x", "the weight 'x' is no finite number"),
    ("model:/nowhere/at/all", "there is no directory /nowhere/at/all")])
def test_a_mistake_is_told_in_a_line(text, message):
    with pytest.raises(ValueError, match=f"^--reward .*{message}") as error:
        parse_rewards([text])
    assert len(str(error.value).splitlines()) == 1 and text in str(error.value)


def test_the_same_reward_twice_is_refused():
    with pytest.raises(ValueError, match="--reward format:2: format is there twice"):
        parse_rewards(["format", "format:2"])


def test_a_file_that_is_no_python_is_named_with_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("def f(p, c, r):\n    return [\n")
    with pytest.raises(ValueError, match=r"broken.py: line 2 is no Python: '\[' was never closed"):
        parse_rewards([f"{tmp_path}/broken.py:f"])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ValueError, match="--reward math needs math-verify: .* -m pip install 'math-verify>=0.9'"):
        parse_rewards(["math"])


def test_neither_torch_nor_the_file_is_imported(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit(3)\ndef f(): ...\n")
    code = ("import sys\nfrom megatron_deepseek.rewards.spec import parse_rewards\n"
            f"parse_rewards(['{tmp_path}/mine.py:f', 'format'])\nsys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
