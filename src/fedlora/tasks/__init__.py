"""What a model is fine-tuned for."""
