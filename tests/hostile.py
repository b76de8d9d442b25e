"""A node with a clinic's file, and a server that may ask it for anything."""

import json

from fedlora.config.experiment import build
from fedlora.deploy.node import Node
from fedlora.deploy.settings import Settings
from fedlora.deploy.wire import (
    PROTOCOL,
    ClientRecord,
    ClientTask,
    Handshake,
    Rejected,
    RoundRecord,
    TaskRequest,
    decode_message,
    encode_message,
)
from fedlora.messages import Round
from fedlora.rounds.codec import encode
from fedlora.version import __version__

from tiny import LABELS, tiny_bert
from wired import problem

SECRETS = ("Patient", "HIV", "diagnosis", "clinic.jsonl", "Error")


def furnish(home):
    """Puts a model and a clinic's file there."""
    tiny_bert(home / "bert")
    rows = [
        {"text": f"Patient {i} has HIV since {1900 + i}", "label": LABELS[i % len(LABELS)], "diagnosis": f"HIV {i}"}
        for i in range(20)
    ]
    (home / "clinic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


class Owner:
    """A node with a file of its own, and what its owner has been told."""

    def __init__(self, home, folder, **more):
        settings = {"data": str(home / "clinic.jsonl"), "overrides": [f"model={home / 'bert'}"], "accept": True}
        Settings(clients=["clinic"], **{**settings, **more}).write(folder)
        self.told = []
        self.node = Node(folder, self.told.append)

    def stop(self):
        """Releases the node's runs, as if its process ended."""
        for run in self.node._runs.values():
            run.release()

    def handshake(self, home, **more):
        return self.ask(handshake(home, **more))

    def ask(self, header, payloads=()):
        self.raw = self.node.reply(encode_message(header, payloads))
        header, self.payloads = decode_message(self.raw, 1)
        return header


def handshake(home, labels=LABELS, run="r", session="1", **more):
    table = problem(home, **{"data": {"source": "none", "labels": list(labels)}, **more})
    experiment = build(table).to_toml()
    return Handshake(
        protocol=PROTOCOL,
        version=__version__,
        run=run,
        experiment=experiment,
        labels=list(labels),
        server_session_id=session,
        done=0,
    )


def silent(raw):
    """Whether nothing of the clinic's file is in a message."""
    return not any(secret.encode() in raw for secret in SECRETS)


def trained(owner, index=0, attempt=0, kind="train", change=None):
    """The node's reply to a request for the training of its client from the initial adapter, or from a changed one."""
    session = owner.node._run("r").session
    (client,) = owner.node._run("r").clients()
    rnd = Round(index, 0, attempt)
    download = session.method.send(session.method.init_server(session.adapted.spec, 0), client, rnd)
    if change is not None:
        download = {name: change(x) for name, x in download.items()}
    request = TaskRequest(
        kind=kind,
        run="r",
        round_record=RoundRecord(index=index, seed=0, attempt=attempt, expected_cohort=1),
        expected_base_updates=[],
        tasks=[ClientTask(client=ClientRecord.of(client), download=0)],
    )
    return owner.ask(request, [encode(download)])


def reason_of(result):
    """The code of the client's failure, None if it has not failed."""
    failure = result.failure if isinstance(result, Rejected) else result.results[0].failure
    return None if failure is None else failure.reason
