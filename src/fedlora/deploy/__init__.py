"""Clients on other machines: the Flower backend, which sends messages through a SuperLink and SuperNodes."""
