"""This project's engine, in `batches` of requests that come together."""

from pathlib import Path

import torch
from timing import asked, measure

from megatron_deepseek import (
    Engine,
    EngineSettings,
    LoadSettings,
    SamplingParameters,
    join_ranks,
    load_model,
    open_model,
)
from megatron_deepseek.inference.cache import bytes_of_token

given = asked()
torch.set_num_threads(given["threads"])
files = open_model(Path(given["directory"]), mtp=given["draft_tokens"] > 0, tokenizer=None)
length = given["prompt_tokens"] + given["new_tokens"] + 2
settings = LoadSettings(dtype=getattr(torch, given["dtype"]), form=given["form"], max_length=length)
engine = Engine(load_model(files, join_ranks(), settings),
                EngineSettings(max_length=length, max_running=max(given["batches"]), token_budget=2048,
                               draft_tokens=given["draft_tokens"]))


def answer(prompts: list[list[int]], number: int) -> list[list[int]]:
    outputs = engine.generate(prompts, SamplingParameters(max_tokens=number, temperature=0, ignore_eos=True))
    return [each[0].tokens for each in outputs]


measure(answer, given, bytes_of_token(engine.model.widths, engine.model.dtype))
