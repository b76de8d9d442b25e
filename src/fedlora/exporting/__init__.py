"""Adapters for PEFT and merged models."""
