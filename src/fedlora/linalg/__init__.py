"""Linear algebra on factored matrices. Operates on tensors only, and imports no other part of the package."""
