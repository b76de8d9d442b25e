"""Output for users: tables, live progress, and the pages of the methods."""
