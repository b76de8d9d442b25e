"""The settings of an experiment: their sections and checks, files, messages and reference."""
