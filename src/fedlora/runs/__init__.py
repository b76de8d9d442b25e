"""Run directories: their files, their start and their resumption."""
