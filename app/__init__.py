"""Lodger: one NF4-quantized base model, every tenant's LoRA adapter served on it in one mixed batch."""

__version__ = "0.1.0"
