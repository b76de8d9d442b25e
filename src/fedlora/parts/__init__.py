"""The kinds of adapter parts; each file has one kind, which computes with its own factors. `table` lists them."""
