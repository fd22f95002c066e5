"""The package from the top: names that are there, and what docs/library.md and then docs/inference.md show, run as
they stand.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

from forked import run_script

import megatron_deepseek

ROOT = Path(__file__).parents[2]


def run_forked(code: str, directory: Path) -> str:
    """Return what `code` prints in a process that begins with everything imported."""
    script, out, errors = (directory / name for name in ("page.py", "out", "errors"))
    script.write_text(code)
    assert run_script([str(script)], out, errors) == 0, errors.read_text()
    return out.read_text()


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_where_it_is_said_to_be():
    for name in megatron_deepseek.__all__:
        found = getattr(megatron_deepseek, name)
        assert getattr(importlib.import_module(found.__module__), name) is found
    assert set(megatron_deepseek.__all__) <= set(dir(megatron_deepseek))
    assert not hasattr(megatron_deepseek, "no_such_name")


def test_torch_is_loaded_when_it_is_needed():
    assert run_python("import sys, megatron_deepseek\nmegatron_deepseek.load_config('tiny')\n"
                      "print('torch' in sys.modules)") == "False\n"


def test_the_pages_run_as_they_stand(tmp_path):
    """Shapes and losses as they say; the loss falls. The model that is trained then answers."""
    blocks, answering = (re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
                         for page in ("library.md", "inference.md"))
    assert (len(blocks), len(answering)) == (4, 2)
    checkpoints = f"from pathlib import Path\ncheckpoints = Path({str(tmp_path)!r})\n"
    lines = run_forked(checkpoints + "".join([*blocks, *answering]), tmp_path).splitlines()
    assert int(lines[0]) > 1e6 and lines[1:3] == ["torch.Size([4, 64])", "torch.Size([4, 64, 4])"]
    first, *_, last = (float(line.split()[0]) for line in lines[3:7])
    assert last < first - 0.1
    assert (tmp_path / "iter_0000003" / ".metadata").exists()
    for line in lines[7:9]:
        assert line.count(",") == 14 and " length [-" in line
    *steps, drafts = lines[9:]
    assert steps[-1] == "True 8 True" and drafts.startswith("(")
