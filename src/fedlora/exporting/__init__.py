"""Export of PEFT adapters and merged models."""
