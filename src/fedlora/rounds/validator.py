"""Validation of every upload before it affects the server's state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedlora.adapter import AdapterSpec, Tensors
from fedlora.messages import ClientInfo, Features, LabelledFeatures, Reply, Round
from fedlora.method import AnyMethod, SelectiveUpload
from fedlora.printable import listed
from fedlora.rounds.finite import LARGEST_ENTRY, NOT_FINITE, magnitude


@dataclass(frozen=True)
class Failed:
    """A client without a reply, and the reason."""

    client: ClientInfo
    reason: str


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

    def rejection_reason(self, reply: Reply) -> str | None:
        """Short reason for rejecting this reply; None if accepted. A client is accepted at most once per round."""
        reason = self._identity(reply) or self._content(reply)
        if reason is None:
            self._seen.add(reply.client.id)
        return reason

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

    def _content(self, reply: Reply) -> str | None:
        expected = _expected_upload(self.method, self.spec, reply.client, self.sent[reply.client], self.rnd)
        if missing := expected.keys() - reply.upload.keys():
            return f"missing {listed(sorted(missing), 1)}"
        if extra := reply.upload.keys() - expected.keys():
            return f"unexpected {listed(sorted(extra), 1)}"
        for name, tensor in reply.upload.items():
            if tensor.dtype != expected[name].dtype:
                return f"sent {name} as {tensor.dtype}, expected {expected[name].dtype}"
        try:
            if isinstance(self.method, SelectiveUpload):
                expected = self.method.expected_upload(self.spec, reply.upload, expected, reply.client, self.rnd)
        except ValueError as error:
            return f"invalid selection: {error}"
        for name, tensor in reply.upload.items():
            if tensor.shape != expected[name].shape:
                return f"sent {name} with shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            largest = magnitude(tensor) if tensor.is_floating_point() else 0.0
            if not math.isfinite(largest):
                return f"sent {name} with {NOT_FINITE}"
            if largest > LARGEST_ENTRY:
                return f"sent {name} with an entry of magnitude {largest:.4g}, expected at most {LARGEST_ENTRY:.4g}"
        if self.max_norm is not None:
            norm = change_norm(reply.upload, self.sent[reply.client])
            if norm > self.max_norm:
                return f"change has norm {norm:.4g}, expected at most {self.max_norm:.4g}"
        return None


def change_norm(upload: Tensors, sent: Tensors) -> float:
    """Frobenius norm, over all tensors, of the upload minus the download of the same name and shape, if any.

    Integer tensors are indices, and excluded from the norm.
    """
    total = 0.0
    for name, tensor in upload.items():
        if not tensor.is_floating_point():
            continue
        before = sent.get(name)
        change = tensor if before is None or before.shape != tensor.shape else tensor - before
        total += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
    return math.sqrt(total)


def _expected_upload(method: AnyMethod, spec: AdapterSpec, client: ClientInfo, sent: Tensors, rnd: Round) -> Tensors:
    """Upload with the expected names, shapes and dtypes: the result of the method's work if training changes nothing.

    The server does not know a client's features, so the template assumes a client without examples.
    """
    job = method.work(method.init_client(spec, client, rnd.seed), sent, client, rnd)
    no_examples = LabelledFeatures(torch.zeros(0, spec.features), torch.zeros(0, dtype=torch.long), spec.classes)
    try:
        request = next(job)
        while True:
            request = job.send(no_examples if isinstance(request, Features) else request.start)
    except StopIteration as done:
        upload: Tensors = done.value[1]
        return upload


def _name(rnd: Round) -> str:
    return f"round {rnd.index + 1}" + (f", attempt {rnd.attempt + 1}" if rnd.attempt else "")
