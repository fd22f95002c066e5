"""The package and its ranges of dependencies; constraints.txt has the exact versions that it was tested with."""

from setuptools import find_namespace_packages, setup

setup(
    name="megatron-deepseek",
    version="0.1.0",
    description="Megatron-style training of DeepSeek models on PyTorch",
    packages=find_namespace_packages(include=["megatron_deepseek", "megatron_deepseek.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "megatron-core>=0.16,<0.17",
        "tokenizers>=0.20",
        "matplotlib>=3.8",
        "tqdm>=4.60",
        "xxhash>=3.0",
    ],
    extras_require={
        "test": ["pytest>=8", "hypothesis>=6", "transformers>=5", "nltk>=3.9"],
        "sentences": ["nltk>=3.9"],  # tools/preprocess_data.py --split-sentences
        "tensorboard": ["tensorboard>=2.15"],
    },
)
