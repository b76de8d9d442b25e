"""What users read: tables, live progress, and the pages of the methods."""
