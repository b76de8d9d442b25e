"""Differential privacy: mechanisms, their account, the statement of a guarantee, and audits."""
