"""The Flower ClientApp that an app must name. It answers nothing: `fedlora join` starts nodes, and runs no app."""

from flwr.clientapp import ClientApp

app = ClientApp()
