"""Examples, and their division among clients."""
