"""Transformers models and the places of the factors in them."""
