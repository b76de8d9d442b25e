"""Validation of every upload before it affects the server's state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.messages import ClientInfo, Features, Fit, Gradient, LabelledFeatures, Reply, Round, Trained, Upload
from fedlora.method import AnyMethod, ClientRound
from fedlora.printable import listed
from fedlora.rounds.cohort_checks import difference_norm
from fedlora.rounds.finite import LARGEST_ENTRY, NOT_FINITE, magnitude


@dataclass(frozen=True)
class Failed:
    """A client without a reply, the reason, and the number of its private steps so far, which count all the same."""

    client: ClientInfo
    reason: str
    private_steps: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Expected:
    """What is known of a client's round before its reply, and its upload if training changed nothing."""

    known: ClientRound
    template: Upload


@dataclass(frozen=True)
class UploadValidator:
    """Validates uploads against the downloads of the chosen clients, which determine the expected uploads."""

    method: AnyMethod
    spec: AdapterSpec
    rnd: Round
    sent: Mapping[ClientInfo, Tensors]
    max_norm: float | None = None
    max_examples: int | None = None
    _seen: set[str] = field(default_factory=set)

    def accept(self, reply: Reply) -> "Expected | str":
        """What was expected of the client; or the short reason for rejecting the reply.

        A client is accepted at most once per round.
        """
        if reason := self._identity(reply):
            return reason
        known = self.known(reply.client)
        expected = Expected(known, template_upload(self.method, known))
        if reason := self._content(reply, expected):
            return reason
        self._seen.add(reply.client.id)
        return expected

    def known(self, client: ClientInfo) -> ClientRound:
        """What is known of a chosen client's round before its reply."""
        initial = self.method.init_client(self.spec, client, self.rnd.seed)
        return ClientRound(self.spec, client, self.rnd, self.sent[client], initial)

    def _identity(self, reply: Reply) -> str | None:
        if reply.client.id in self._seen:
            return "has already replied in this round"
        if reply.round != self.rnd:
            return f"reply is for {_name(reply.round)}, current is {_name(self.rnd)}"
        if reply.client not in self.sent:
            return "was not selected for this round, or has a different rank or number of examples"
        if self.max_examples is not None and reply.client.examples > self.max_examples:
            return f"claims {reply.client.examples} examples, expected at most {self.max_examples} (sampling.max_examples)"
        if not 0 < reply.weight <= reply.client.examples:
            return f"has weight {reply.weight}, expected a number above 0, at most its {reply.client.examples} examples"
        return None

    def _content(self, reply: Reply, before: "Expected") -> str | None:
        known, template = before.known, before.template
        tensors, expected = reply.upload.flat(), template.flat()
        if missing := expected.keys() - tensors.keys():
            return f"missing {listed(sorted(missing), 1)}"
        if extra := tensors.keys() - expected.keys():
            return f"unexpected {listed(sorted(extra), 1)}"
        for name, tensor in tensors.items():
            if tensor.dtype != expected[name].dtype:
                return f"sent {name} as {tensor.dtype}, expected {expected[name].dtype}"
        try:
            expected = self.method.expected_upload(known, reply.upload, template).flat()
        except ValueError as error:
            return f"invalid selection: {error}"
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                return f"sent {name} with shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            largest = magnitude(tensor) if tensor.is_floating_point() else 0.0
            if not math.isfinite(largest):
                return f"sent {name} with {NOT_FINITE}"
            if largest > LARGEST_ENTRY:
                return f"sent {name} with an entry of magnitude {largest:.4g}, expected at most {LARGEST_ENTRY:.4g}"
        if self.max_norm is not None:
            norm = difference_norm(reply.upload, template)
            if norm > self.max_norm:
                return f"change has norm {norm:.4g}, expected at most {self.max_norm:.4g}"
        return None


def template_upload(
    method: AnyMethod, known: ClientRound, requested: list[Fit | Gradient | Features] | None = None
) -> Upload:
    """The upload of a new client whose training changes nothing: the expected names, shapes and dtypes.

    The server does not know a client's features, so the template assumes a client without examples. The requests of the
    client's work are appended to `requested`.
    """
    job = method.work(known.initial, known.download, known.client, known.round)
    no_examples = LabelledFeatures(
        torch.zeros(0, known.spec.features), torch.zeros(0, dtype=torch.long), known.spec.classes
    )
    try:
        request = next(job)
        while True:
            if requested is not None:
                requested.append(request)
            request = job.send(_unchanged(request, no_examples))
    except StopIteration as done:
        upload: Upload = done.value[1]
        return upload


def _unchanged(request: Fit | Gradient | Features, examples: LabelledFeatures) -> Any:
    """The answer of a trainer that changes nothing."""
    if isinstance(request, Features):
        return examples
    return Trained(request.start) if isinstance(request, Fit) else _zeros(request)


def _zeros(request: Gradient) -> Adapter:
    """A gradient of zero."""
    return {
        name: replace(part, **{f: torch.zeros_like(x) for f, x in vars(part).items() if f in request.train})  # type: ignore[arg-type]
        for name, part in request.start.items()
    }


def _name(rnd: Round) -> str:
    return f"round {rnd.index + 1}" + (f", attempt {rnd.attempt + 1}" if rnd.attempt else "")
