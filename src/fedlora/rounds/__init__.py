"""The rounds: who takes part, what travels, what is kept."""
