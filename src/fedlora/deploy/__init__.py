"""The clients on other machines: the exchange over Flower, whose SuperLink and SuperNodes carry the bytes."""
