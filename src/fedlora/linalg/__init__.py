"""Tensors only: factored matrices and what can be computed with them. Imports nothing else of the package."""
