"""Megatron-style training of DeepSeek models on PyTorch's distributed engine.

Every command imports this first, so the Python version and the packages that all of them need are checked here, with a
message of one line. Python 3.8 can read this file.
"""

import importlib
import importlib.util
import sys

__version__ = "0.1.0"


def _refuse(problem):
    sys.stderr.write("error: megatron_deepseek needs %s\n" % problem)
    raise SystemExit(2)


if sys.version_info < (3, 10):
    _refuse("Python 3.10 or newer, and %s is %s" % (sys.executable, sys.version.split()[0]))
for _name in ("torch", "numpy", "tokenizers", "tqdm", "xxhash"):
    if importlib.util.find_spec(_name) is None:
        _refuse("%s, which %s does not have: `make venv` and `source .venv/bin/activate`, or pip install -e ."
                % (_name, sys.executable))

# The public names and their modules, which are loaded when a name is first used: importing torch takes a while.
_EXPORTS = {
    "Batch": "data.batch", "BuildOptions": "model.build", "Contribution": "model.step", "Engine": "inference.engine",
    "EngineSettings": "inference.settings", "Layout": "parallel.layout", "LoadSettings": "inference.loading",
    "ModelConfig": "model.architecture.config", "NextToken": "training.next_token",
    "Objective": "training.objective", "OptimizerSettings": "settings", "PipelineSettings": "settings",
    "Precision": "model.build", "Replicas": "inference.replicas",
    "SamplingParameters": "inference.sampling_parameters", "TokenizerChoice": "inference.model_files",
    "Trainer": "training.trainer", "TrainingSpec": "training.trainer", "join_ranks": "inference.loading",
    "load_config": "model.architecture.presets", "load_model": "inference.loading",
    "load_weights": "checkpoint.job.distributed", "make_trainer": "library", "open_model": "inference.model_files",
    "start_job": "library",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    return getattr(importlib.import_module("%s.%s" % (__name__, _EXPORTS[name])), name)


def __dir__():
    return sorted(set(globals()) | set(_EXPORTS))
