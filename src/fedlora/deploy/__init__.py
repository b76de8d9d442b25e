"""Clients on other machines: the Flower backend, whose messages travel through a SuperLink and SuperNodes."""
