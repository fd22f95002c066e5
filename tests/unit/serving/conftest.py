"""One server for all tests of this folder that ask one by HTTP, and the engine that its answers are compared with."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from served import Served, serving
from served_models import write_served
from small_engines import V3_MTP

from megatron_deepseek.inference.engine import Engine
from megatron_deepseek.inference.loading import load_model
from megatron_deepseek.inference.model_files import open_model
from megatron_deepseek.inference.settings import EngineSettings

LONG = replace(V3_MTP, max_position_embeddings=4096)  # so that an answer can take seconds
LENGTH = 4096


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_served(tmp_path_factory.mktemp("served") / "tiny", LONG)


@pytest.fixture(scope="session")
def served(checkpoint, tmp_path_factory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server"), checkpoint, "--template", "deepseek-v3.1", "--max-running", "8",
                 "--idle-seconds", "2") as one:
        yield one


@pytest.fixture(scope="module")
def engine(checkpoint, meshes) -> Engine:
    return Engine(load_model(open_model(checkpoint), meshes), EngineSettings(LENGTH))
