"""Federated rounds: client sampling, messages, checkpoints."""
