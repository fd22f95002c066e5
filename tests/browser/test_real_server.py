"""The page from tools/serve.py itself, over a tiny model of random weights, which babbles but keeps the contract."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from driven_page import DrivenPage
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).parents[2]
# The environment of the package is another one than the browser's.
PYTHON = os.environ.get("SERVE_PYTHON") or str(ROOT / ".venv" / "bin" / "python")
WRITE = "import sys; from pathlib import Path; from served_models import write_served; write_served(Path(sys.argv[1]))"
LENGTH = 128  # tokens, of a conversation


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a server of its own; it must end in order when it is told to."""
    model = tmp_path_factory.mktemp("model")
    helpers = [ROOT, *(ROOT / "tests" / "helpers" / name for name in ("", "ranks", "commands"))]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, helpers)), "OMP_NUM_THREADS": "1"}
    subprocess.run([PYTHON, "-c", WRITE, str(model)], env=environ, check=True)
    command = [PYTHON, str(ROOT / "tools" / "serve.py"), "--load", str(model), "--port", "0",
               "--served-model-name", "tiny", "--template", "deepseek-v3"]
    served = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        for line in served.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError("the server ended before it was ready")
        yield found[0] + "/"
        served.send_signal(signal.SIGTERM)
        assert served.wait(60) == 0
    finally:
        served.kill()


@pytest.fixture
def page(driver, url):
    return DrivenPage(driver, url).open()


def test_the_model_answers_as_its_settings_say(page):
    """Greedy answers are equal, and as long as they may be."""
    assert page.one("#model").text == "tiny"
    page.fill("temperature", "0")
    page.fill("max_tokens", "12")
    first = page.say("Hello, model")
    number = int(re.match(r"(\d+) tokens", page.all(".meta")[-1].text)[1])
    assert 1 <= number <= 12 and ("limit" in page.all(".meta")[-1].text) == (number == 12)
    page.click("Answer again")
    assert page.answered() == first
    assert re.fullmatch(rf"\d+ of {LENGTH} tokens", page.one("#context").text)
    page.picture("real-server")
    assert not page.faults()


def test_an_error_of_the_server_can_be_read(page):
    """A conversation longer than the model reads is refused in words, not by a status."""
    page.say("x" * 5000)
    problem = page.one(".problem").text
    assert re.search(r"tokens", problem) and "Try again" in problem and "status" not in problem
    page.picture("real-error")
    page.faults("status of 4")


def test_stop_frees_the_model_for_the_next(page):
    page.say("Hello", wait=False)
    page.press(Keys.ESCAPE)
    page.answered()
    page.fill("max_tokens", "3")
    page.say("Hello again")
    assert not page.all(".problem:not([hidden])")


