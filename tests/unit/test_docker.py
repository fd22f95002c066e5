"""The Dockerfile: everything that it names is there, and hadolint has nothing to say where it is installed."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [line.split(maxsplit=1) for line in
                re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines() if line]


def given(instruction: str) -> list[str]:
    return [text for name, text in INSTRUCTIONS if name == instruction]


def test_the_file_is_linted():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; make lint-docker installs it")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_it_copies_and_runs_is_there():
    copied = [word for text in given("COPY") if not text.startswith("--from") for word in text.split()[:-1]]
    assert copied == ["constraints.txt", "."] and (ROOT / "constraints.txt").exists()
    assert given("ENTRYPOINT") == ['["python", "tools/launch.py"]'] and (ROOT / "tools/launch.py").exists()
    (build,) = [text for text in given("RUN") if "csrc/build.py" in text]
    assert "MEGATRON_DEEPSEEK_CUDA=1" in build, "builds or fails"
    extras = re.search(r"'\.\[(.*)\]'", build).group(1).split(",")
    known = re.findall(r'"(\w+)": \[', (ROOT / "setup.py").read_text())
    assert set(extras) <= set(known)


def test_torch_is_the_one_of_the_constraints():
    (install,) = [text for text in given("RUN") if "torch==" in text]
    pattern = re.search(r"grep '(.*?)'", install).group(1)
    found = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(pattern, line)]
    assert len(found) == 1 and "assert torch.version.cuda" in install


def test_the_user_has_no_rights_and_may_write_to_runs():
    assert given("USER") == ["${UID}"] and "UID=1000" in given("ARG")
    last = INSTRUCTIONS.index(["USER", "${UID}"])
    assert not [name for name, _ in INSTRUCTIONS[last:] if name in ("RUN", "COPY")]
    assert any("--owner \"${UID}\" /opt/megatron_deepseek/runs" in text for text in given("RUN"))


@pytest.mark.parametrize("path, left_out", [
    (".git", True), (".venv", True), ("runs", True), ("megatron_deepseek/ops/libmegatron_deepseek.so", True),
    ("setup.py", False), ("csrc/build.py", False), ("tools/launch.py", False), ("examples/common.sh", False),
    ("megatron_deepseek/planning/gpus.json", False), ("constraints.txt", False),
])
def test_the_image_gets_the_sources_alone(path, left_out):
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    matched = any(fnmatch(part, pattern.removeprefix("**/")) if pattern.startswith("**/") else fnmatch(path, pattern)
                  for pattern in patterns for part in Path(path).parts)
    assert matched == left_out


def test_the_page_has_the_commands_of_the_file():
    page = (ROOT / "docs" / "docker.md").read_text()
    build = re.search(r"#   (docker build .*)", DOCKERFILE).group(1)
    assert build in page and all(f"--build-arg {name}=" in page for name in ("UID", "CUDA"))
