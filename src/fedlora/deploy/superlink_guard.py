"""Flower's SuperLink behind our guard, on an already open socket, with the nodes' keys registered before it serves."""

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink import main as superlink

from fedlora.deploy.flower_command import flower_command
from fedlora.deploy.guard import SECRET, Guard


def main(descriptor: int, keys: list[Path]) -> None:
    """Runs `flower-superlink` on the socket of this descriptor, for nodes with these public keys."""
    command: Any = import_module("flwr.superlink.cli.flower_superlink")  # a function of the package has the same name
    create, superexec = superlink.create_app, command._get_superexec_command

    def guarded(*arguments: Any, **named: Any) -> Any:
        app = create(*arguments, **named)
        state = app.state.linkstate_factory.state()
        for path in keys:
            key = load_ssh_public_key(path.read_bytes())
            assert isinstance(key, EllipticCurvePublicKey)
            state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key_to_bytes(key), HEARTBEAT_DEFAULT_INTERVAL)
        app.add_middleware(Guard, secret=os.environ[SECRET])
        return app

    def ours(**named: Any) -> list[str]:
        return flower_command(*superexec(**named))

    superlink.create_app = guarded
    command._get_superexec_command = ours
    command.uvicorn = SimpleNamespace(run=partial(uvicorn.run, fd=descriptor))
    command.flower_superlink()


if __name__ == "__main__":
    descriptor, folder, *sys.argv[1:] = sys.argv[1:]
    main(int(descriptor), sorted(Path(folder).glob("*.pub")) if folder else [])
