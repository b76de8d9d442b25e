"""Transformers models with LoRA layers, and their tokenizers."""
