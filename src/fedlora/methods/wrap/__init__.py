"""Wrappers, which make a method from a method."""
