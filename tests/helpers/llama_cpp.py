"""llama.cpp for tests: its converter, and its server as the wheel xllamacpp has it, both from the folder $LLAMA_CPP.

`make test-all` and `make test-engines` install them there. The converter brings a package gguf of its own, so that
neither is installed beside this project's.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from engine_answers import LENGTH, PROMPTS, TOP, Answer

SCRIPTS = Path(__file__).parents[1] / "engines"
FOLDER = os.environ.get("LLAMA_CPP")
_PATIENCE = 240.0  # seconds, on a busy machine


def need_llama_cpp() -> None:
    """Skip the module unless the targets of make have installed llama.cpp, and said where."""
    if not FOLDER:
        pytest.skip("make test-all and make test-engines install llama.cpp, and say where", allow_module_level=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}


def convert_by_llama_cpp(jobs: Iterable[tuple[str, Path, Path]]) -> None:
    """Write GGUF files by llama.cpp's own converter: the type, the file and the Hugging Face directory of each."""
    words = [sys.executable, str(SCRIPTS / "llama_convert.py"), *(str(word) for job in jobs for word in job)]
    done = subprocess.run(words, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class LlamaServer:
    """A server of llama.cpp that runs."""

    url: str

    def ask(self, path: str, **body) -> dict:
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=_PATIENCE) as response:
            return json.load(response)

    def get(self, path: str) -> dict:
        with urlopen(self.url + path, timeout=_PATIENCE) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text without begin, in which special tokens are read as such."""
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def answer(self, prompt: list[int]) -> Answer:
        """Return the text, and the first token's log-probabilities where the server tells them.

        It tells nothing of a token that ends amid a UTF-8 character: its list begins with a later token then.
        """
        said = self.ask("/completion", prompt=prompt, n_predict=LENGTH, temperature=0, samplers=["top_k"], top_k=1,
                        ignore_eos=True, return_tokens=True, n_probs=TOP, cache_prompt=False)
        told = said["completion_probabilities"][0]
        first = told["top_logprobs"] if told["id"] == said["tokens"][0] else []
        return Answer(said["tokens"], {each["id"]: each["logprob"] for each in first})

    def answers(self) -> list[Answer]:
        """Return the answers to PROMPTS."""
        return [self.answer(prompt) for prompt in PROMPTS]


@contextmanager
def llama_serving(file: Path) -> Iterator[LlamaServer]:
    """Serve a GGUF file beside the block."""
    words = [sys.executable, str(SCRIPTS / "llama_serve.py"), str(file)]
    with subprocess.Popen(words, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            assert url.startswith("http"), f"{file} does not load"
            yield LlamaServer(url)
        finally:
            server.kill()
