"""Training and evaluation of adapters inside a transformer."""
