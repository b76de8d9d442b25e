"""The Flower ClientApp: it hands each message to the node's worker and its answer back. Flower starts it anew each time."""

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.rounds.flower.lifetime import end_with
from fedlora.rounds.flower.line import SETTING, Unreachable, ask
from fedlora.rounds.flower.parcel import packed, unpacked

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """The worker's answer. The worker ends with the parent of this process, which ends with the SuperNode."""
    end_with(os.getppid())
    folder = context.node_config.get(SETTING)
    if not isinstance(folder, str) or not Path(folder).is_dir():
        raise Unreachable(f"the SuperNode's --node-config has no node's folder under {SETTING!r}; fedlora join makes one")
    return Message(packed(ask(Path(folder), unpacked(message), os.getppid())), reply_to=message)
