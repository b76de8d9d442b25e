"""Tasks that a model can be fine-tuned for: one file for each kind, and the table of them."""
