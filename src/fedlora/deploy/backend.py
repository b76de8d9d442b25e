"""Backend for clients on other machines: training, evaluation and final adapters. Independent of the transport."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from fedlora.adapter import Tensors
from fedlora.deploy.admission import NodeAdmission
from fedlora.deploy.registry import NodeRegistry
from fedlora.deploy.scores import ScoreCheck
from fedlora.deploy.task_exchange import Results, TaskExchange
from fedlora.deploy.transport import Transport
from fedlora.deploy.wire import Handshake
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Statistics, Upload
from fedlora.rounds.client import Trainer
from fedlora.rounds.codec import decode
from fedlora.rounds.validator import Failed


class FlowerBackend:
    """Backend over a transport. Nodes that connect late or reconnect are accepted between two rounds."""

    def __init__(
        self,
        transport: Transport,
        handshake: Handshake,
        admission: NodeAdmission,
        trainer: Trainer,
        scores: ScoreCheck,
        deadline: float,
        poll: float = 0.5,
        notify: Callable[[str], None] = print,
        max_tensors: int = 2**16,
    ) -> None:
        """`handshake` describes the run; `notify` receives one line for each rejected node and each failed client.

        `max_tensors` is the maximum number of tensors in an upload. `deadline` and `poll`, the polling interval, are in
        seconds.
        """
        self._trainer, self._score_check, self._notify, self._max_tensors = trainer, scores, notify, max_tensors
        self._registry = NodeRegistry(transport, handshake, admission, notify, poll)
        self._exchange = TaskExchange(transport, self._registry, handshake.run, deadline, poll)

    def wait_for_clients(self, count: int, seconds: float) -> None:
        """Waits until `count` clients have connected.

        Raises:
            RunStopped: fewer connected within `seconds`; names the connected clients and the rejected nodes.
        """
        self._registry.wait_for_clients(count, seconds)

    def clients(self) -> Sequence[ClientInfo]:
        """All accepted clients, including those whose node is disconnected."""
        return self._registry.clients()

    def held(self) -> Mapping[str, Sequence[int]]:
        """Base updates that the clients' nodes have reported, and those sent to them since."""
        return {
            client.id: node.expected_base_updates() for node in self._registry.nodes.values() for client in node.clients
        }

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Changes the server's own base, which the global evaluation uses."""
        self._trainer.merge_into_base(change)

    def train_clients(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[Reply | Failed]:
        """Sends the requests immediately; yields replies in the order of `sent`, a failure if one misses the deadline."""
        return self._replies(self._exchange.send("train", rnd, sent, pending))

    def evaluate(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[ClientInfo, Statistics | None]]:
        """Sends the requests immediately; collects the valid scores that arrive before the deadline."""
        return self._scores(rnd, self._exchange.send("evaluate", rnd, sent, pending))

    def save_adapters(self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]) -> None:
        """Makes clients write the adapter for round `rnd` to their nodes' folders; reports the clients that have."""
        results = self._exchange.send("save_adapter", rnd, sent, pending)
        failed = {client.id: result for client, result in results if isinstance(result, str)}
        for client, reason in failed.items():
            self._notify(f"client {client}: saving its adapter failed: {reason}")
        self._notify(
            f"adapters of {len(sent) - len(failed)} of {len(sent)} clients are saved in their nodes' folders, in "
            "runs/*/adapter"
        )

    def finish(self) -> None:
        """Notifies the connected nodes that the run is finished; waits only briefly for their replies."""
        self._registry.send_finished()

    def _replies(self, results: Results) -> Iterator[Reply | Failed]:
        for client, found in results:
            if isinstance(found, str):
                yield Failed(client, found)
                continue
            try:
                if found.payload is None:
                    raise ValueError("sent no upload")
                upload = Upload.of(decode(found.payload, self._max_tensors))
                yield Reply(client, found.round, upload, found.result.weight, found.result.loss, found.result.steps)
            except ValueError as error:
                yield Failed(client, str(error))

    def _scores(self, rnd: Round, results: Results) -> Iterator[tuple[ClientInfo, Statistics | None]]:
        for client, found in results:
            if isinstance(found, str):
                self._notify(f"client {client.id}: evaluation failed: {found}")
                continue
            try:
                if found.round != rnd:
                    raise ValueError("is for another round")
                statistics = self._score_check.read(found.result.examples, found.payload, client)
            except ValueError as error:
                self._notify(f"client {client.id}: its score is rejected: {error}")
            else:
                yield client, statistics
