"""Wrappers: a method in, a method out."""
