"""The clients on other machines: the backend over Flower, whose SuperLink and SuperNodes carry the bytes."""
