"""A server with --compile: the answers of layers that are not compiled, with graphs that were made before it was ready.

The compiler is inductor, as a user has it.
"""

import re
from collections.abc import Iterator

import pytest
from served import Served, serving

from megatron_deepseek.inference.sampling_parameters import SamplingParameters

PROMPTS = ["what is it?", "a", "北京 天气 is" * 9]


@pytest.fixture(scope="module")
def compiled(checkpoint, tmp_path_factory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("compiled"), checkpoint, "--template", "deepseek-v3.1", "--token-budget", "32",
                 "--compile") as one:
        yield one


@pytest.mark.slow
def test_a_compiled_server_answers_as_an_engine_without_graphs(compiled, engine):
    """Prompts of one token and of many, side by side and in chunks: the same likeliest tokens."""
    assert re.search(r"^compiled \d+ graphs in [\d.]+ s$", compiled.errors.read_text(), re.MULTILINE)
    expected = engine.generate(PROMPTS, SamplingParameters(temperature=0, max_tokens=12))
    answer = compiled.post("/v1/completions", {"prompt": PROMPTS, "temperature": 0, "max_tokens": 12})
    assert [each["text"] for each in answer.json["choices"]] == [output.text for (output,) in expected]
    chat = {"messages": [{"role": "user", "content": "what is it?"}], "temperature": 0, "max_tokens": 4}
    assert compiled.post("/v1/chat/completions", chat).status == 200
