"""The Flower ClientApp that an app must name. It handles no messages: `fedlora join` starts nodes without an app."""

from flwr.clientapp import ClientApp

app = ClientApp()
