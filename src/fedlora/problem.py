"""Who has which examples."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedlora.config import Data, Experiment
from fedlora.data.fingerprint import fingerprint
from fedlora.data.partition import Division, divide, share
from fedlora.data.ranks import client_ranks
from fedlora.data.sources import Corpus, load, load_own
from fedlora.errors import UserError
from fedlora.manifest import Client, DataFingerprint, Examples
from fedlora.messages import ClientInfo
from fedlora.rounds.checkpoint import client_folder
from fedlora.rounds.sample import check_cohort


@dataclass(frozen=True)
class Problem:
    """The examples divided among the clients."""

    corpus: Corpus
    division: Division
    members: Sequence[ClientInfo]

    @cached_property
    def fingerprint(self) -> DataFingerprint:
        """What tells whether the examples and their division are the same."""
        shares = [[share.client, share.task, share.train, share.held_out] for share in self.division.shares]
        train, test = self.corpus.train, self.corpus.test
        return DataFingerprint(
            labels=list(self.corpus.labels),
            train=Examples(count=len(train), digest=fingerprint(train)),
            test=Examples(count=len(test), digest=fingerprint(test)),
            partition=hashlib.sha256(json.dumps(shares).encode()).hexdigest(),
            clients=[Client(id=who.id, rank=who.rank, examples=who.examples, task=who.task) for who in self.members],
        )

    @classmethod
    def make(cls, experiment: Experiment, in_memory: Any = None) -> "Problem":
        """Reads and divides the data, or rows in memory in place of their source; takes no model.

        Raises:
            UserError: the data cannot be read, or not be divided so.
        """
        corpus = load(experiment.data, experiment.seed, in_memory)
        division = divide(corpus.train, experiment.clients, experiment.seed)
        wanted, count = experiment.clients.ranks, len(division.shares)
        if isinstance(wanted, list) and len(wanted) != count:
            raise UserError(f"clients.ranks has {len(wanted)} entries, the data give {count} clients")
        if long := [share.client for share in division.shares if len(client_folder(share.client)) > 200]:
            raise UserError(f"the client's name {long[0]!r} is too long for a folder; shorten the names in data.user")
        check_cohort(count, experiment.sampling)
        ranks = client_ranks(wanted, count, experiment.method.rank, experiment.seed)
        shares = zip(division.shares, ranks, strict=True)
        members = [ClientInfo(share.client, rank, len(share.train), share.task) for share, rank in shares]
        most = experiment.sampling.max_examples
        if large := next((who for who in members if who.examples > most), None):
            raise UserError(f"sampling.max_examples = {most}: client {large.id!r} has {large.examples} examples; raise it")
        return cls(corpus, division, members)

    @classmethod
    def of_server(cls, experiment: Experiment) -> "Problem":
        """Only the global test set and the names of the labels: the clients have their examples elsewhere.

        Raises:
            UserError: the data cannot be read.
        """
        corpus = load(experiment.data, experiment.seed)
        return cls(replace(corpus, train=corpus.train.select([])), Division((), 0, 0), [])

    @classmethod
    def without_examples(cls, labels: Sequence[str], members: Sequence[ClientInfo]) -> "Problem":
        """Only the names of the labels and the clients: enough for an export."""
        return cls(load(Data(source="none", labels=list(labels)), 0), Division((), 0, 0), members)

    @classmethod
    def of_client(cls, experiment: Experiment, client: str, file: str, rank: int, labels: Sequence[str]) -> "Problem":
        """One client's own file; no global test set.

        Raises:
            UserError: the file cannot be read, or has a label that is not among `labels`.
        """
        examples = load_own(experiment.data, file, labels, experiment.seed)
        own = share(client, list(range(len(examples))), experiment.clients.held_out, experiment.seed)
        corpus = Corpus(examples, examples.select([]), tuple(labels))
        return cls(corpus, Division((own,), 0, 0), [ClientInfo(client, rank, len(own.train))])
