"""Megatron-style training of DeepSeek models on PyTorch's distributed engine."""

__version__ = "0.1.0"
