"""What leaves a client, and by which guarantee it is covered; what cannot be covered is refused before training."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, Scaling
from fedlora.composed_method import method_of
from fedlora.config.experiment import Experiment
from fedlora.errors import UserError
from fedlora.messages import ClientInfo, Features, Fit, Gradient, Reply, Round, Upload
from fedlora.method import AnyMethod, ClientRound, Local
from fedlora.methods.wrap.wrapper import Request, Wrapper, relay
from fedlora.printable import listed
from fedlora.privacy.record import reasons_against
from fedlora.randomness import generator
from fedlora.ranges import alternatives
from fedlora.rounds.client_privacy import Frame
from fedlora.rounds.collect import collect
from fedlora.rounds.frame import frame_of
from fedlora.rounds.validator import template_upload

FIELDS: Mapping[str, Mapping[str, str]] = {
    "Upload": {"values": "values", "choices": "choices"},
    "Reply": {
        "client": "identity",
        "round": "protocol",
        "upload": "values",
        "weight": "examples",
        "loss": "training",
        "steps": "training",
    },
    "ClientInfo": {"id": "identity", "rank": "identity", "examples": "examples", "task": "identity"},
    "Statistics": {"examples": "scores", "sums": "scores"},
    "HandshakeReply": {
        "kind": "protocol",
        "protocol": "protocol",
        "version": "protocol",
        "node": "identity",
        "base": "protocol",
        "clients": "identity",
        "base_updates": "protocol",
    },
    "ClientRecord": {"id": "identity", "rank": "identity", "examples": "examples"},
    "Done": {"kind": "protocol", "round_record": "protocol", "base_updates": "protocol", "results": "values"},
    "ClientResult": {
        "id": "identity",
        "payload": "values",
        "weight": "examples",
        "loss": "training",
        "steps": "training",
        "examples": "scores",
        "failure": "failure",
    },
    "Rejected": {"kind": "protocol", "failure": "failure"},
    "Failure": {"reason": "failure", "count": "failure"},
    "Received": {"kind": "protocol"},
    "Batch": {"kind": "protocol"},
}
"""Each field of what a client, or its node, sends: the key of the rule of `leaving` that applies to it."""

_ROUNDS = 2  # in which a method without clustering does all that it ever does


@dataclass(frozen=True)
class Released:
    """Something that could leave a client, and the rule for it."""

    what: str
    rule: str


def leaving(experiment: Experiment) -> dict[str, Released]:
    """All that could leave a client in this experiment, by the keys in `FIELDS`; empty without `privacy.unit`.

    The method, with its head and its wrappers, is tried out on a model of two small modules.

    Raises:
        UserError: the guarantee does not cover the settings, or something that leaves a client; the reason, and what to do.
    """
    privacy, name = experiment.privacy, experiment.method.name
    if privacy.unit == "none":
        return {}
    for setting in reasons_against(experiment):
        raise UserError(setting)
    reason, templates = _examined(experiment)
    if reason is not None:
        instead = ", or ".join(_ways_out(experiment))
        raise UserError(
            f"privacy.unit = {privacy.unit!r} is not supported by {name} with these settings: {reason}; {instead}"
        )
    values = sorted({_group(key) for one in templates for key in one.upload.values})
    choices = sorted({key for one in templates for key in one.upload.choices})
    count = "fixed: 1, for each client" if privacy.hides_counts else "public: privacy.public_counts"
    covered = {
        "record": f"covered: DP-SGD on the client, clip {privacy.clip:g}",
        "client": f"covered: the server clips the change to {privacy.clip:g}, and adds noise before anybody else sees it",
    }[privacy.unit]
    return {
        "values": Released(f"values of the upload ({', '.join(values) or 'none'})", covered),
        "choices": Released(
            f"choices in the upload ({', '.join(choices) or 'none'})",
            "covered: computed from trained tensors, which have noise" if choices else "nothing to cover",
        ),
        "examples": Released("number of examples, weight", count),
        "training": Released("training loss, number of steps", "not sent"),
        "scores": Released("scores on held-out examples", "not sent: evaluate.clients = 'none'"),
        "identity": Released("name, rank, task", "fixed by the configuration"),
        "protocol": Released("versions, digest of the base model, rounds, shapes", "fixed by the configuration"),
        "failure": Released("failures", "not covered: a code without data tells that a client did not take part"),
        "time": Released("time of a reply", "not covered: it depends on the number of examples"),
        "personal": Released("personal parts, base updates that are applied", "not sent"),
    }


def refusal(experiment: Experiment) -> str | None:
    """Why the guarantee of `privacy.unit` does not hold with these settings; None if it does."""
    return next(reasons_against(experiment), None) or _examined(experiment)[0]


def covering_settings(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    """Yields each change of a single setting of the method with which the guarantee holds."""
    given, row = experiment.method.model_dump(), experiment.method.row
    for key, value in alternatives(row.make, [key for key in row.settings() if key != "rank"]):
        if value != given[key] and _holds(experiment, method={**given, key: value}):
            yield key, value


def setting_text(experiment: Experiment, key: str, value: Any) -> str:
    """A changed setting of the method as in experiment.toml, without its value if the experiment omits it."""
    return key if experiment.method.model_dump()[key] is None else f"{key} = {json.dumps(value)}"


def trainings(experiment: Experiment) -> list[list[Fit]]:
    """The trainings that some clients request in some rounds, a list for each of both, tried out as by `leaving`."""
    tried = _tried(method_of(experiment), experiment, experiment.clients.ranks is not None)
    return [[request for request in one.requests if isinstance(request, Fit)] for one in tried]


@dataclass(frozen=True)
class _Template:
    """A client's template in one round, and the requests made for it."""

    known: ClientRound
    upload: Upload
    requests: Sequence[Request]


@dataclass(frozen=True)
class _Watched(Wrapper):
    """A method whose requests are noted."""

    requests: list[Request] = field(default_factory=list)

    def work(self, state: Any, download: Mapping[str, Tensor], client: ClientInfo, rnd: Round) -> Local[tuple[Any, Upload]]:
        """The wrapped method's."""

        def ask(request: Request) -> Request:
            self.requests.append(request)
            return request

        return relay(self.inner.work(state, download, client, rnd), ask, lambda _, answer: answer)


def _tried(method: AnyMethod, experiment: Experiment, mixed_ranks: bool) -> Iterator[_Template]:
    """The templates of two clients of each rank in some rounds, whose uploads are these and noise."""
    spec = _small_spec(method.rank, experiment)
    server = method.init_server(spec, 0)
    ranks = sorted({1, method.rank}) if mixed_ranks else [method.rank]
    clients = [ClientInfo(f"{rank}-{i}", rank, 1) for rank in ranks for i in range(2)]
    for index in range(_ROUNDS):
        collected, rnd = None, Round(index, 0, registered=len(clients), expected_cohort=len(clients))
        for client in clients:
            watched = _Watched(method)
            download = method.send(server, client, rnd)
            known = ClientRound(spec, client, rnd, download, method.init_client(spec, client, 0))
            template = template_upload(watched, known)
            yield _Template(known, template, watched.requests)
            rng = generator(0, "noise", index, client.id)
            values = {name: x + 0.1 * torch.randn(x.shape, generator=rng).to(x) for name, x in template.values.items()}
            reply = Reply(client, rnd, replace(template, values=values), 1.0)
            collected = collect(method, server, collected, reply, known)
        server = method.merge(server, collected, rnd).server


def _small_spec(rank: int, experiment: Experiment) -> AdapterSpec:
    """Two modules that are not square, of at least this rank, and a head."""
    sizes = {"first": (rank + 5, rank + 2), "second": (rank + 1, rank + 3)}
    return AdapterSpec(
        modules=sizes,
        head={"head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)},
        weight=lambda name: torch.randn(sizes[name], generator=generator(0, "weight", name)),
        features=3,
        classes=2,
        scaling=Scaling(experiment.lora.alpha, experiment.lora.rslora),
        init=experiment.lora.init,
        magnitudes={name: torch.ones(out) for name, (out, _) in sizes.items()} if experiment.lora.dora else {},
    )


def _examined(experiment: Experiment) -> tuple[str | None, Sequence[_Template]]:
    """Why the guarantee cannot hold for what leaves a client, if it cannot; otherwise, the templates."""
    method, of_clients = method_of(experiment), experiment.privacy.unit == "client"
    any_rank = experiment.method.row.mixed_ranks and not of_clients  # a node may join with a smaller one
    if of_clients and not method.collects_mean:
        return "the server needs each client's upload, not only their mean", ()
    templates = list[_Template]()
    for one in _tried(method, experiment, any_rank or experiment.clients.ranks is not None):
        templates.append(one)
        if not of_clients and (reason := _record_reason(one)):
            return reason, ()
    return _client_reason(method, templates) if of_clients else None, templates


def _record_reason(one: _Template) -> str | None:
    for kind, noun in ((Gradient, "a gradient"), (Features, "features")):
        if any(isinstance(request, kind) for request in one.requests):
            return f"a client's work needs {noun} of its examples without noise"
    return None


def _client_reason(method: AnyMethod, templates: Sequence[_Template]) -> str | None:
    if choices := {key for one in templates for key in one.upload.choices}:
        return f"a client's choice ({listed(sorted(choices), 3)}) depends on its data, without noise"
    if not any(one.upload.values for one in templates):
        return "nothing is uploaded"
    frames: dict[int, Frame] = {}
    for one in templates:
        frame = frame_of(method, one.known)
        first = frames.setdefault(one.known.round.index, frame)
        same = first.template.keys() == frame.template.keys()
        if not same or not all(_equal(x, frame.template[key]) for key, x in first.template.items()):
            return "clients start from different values, so that the mean depends on who takes part"
    return None


def _ways_out(experiment: Experiment) -> Iterator[str]:
    """Yields what could be changed for the guarantee to hold."""
    for key, value in covering_settings(experiment):
        yield f"set method.{setting_text(experiment, key, value)}"
    if experiment.clients.ranks is not None and _holds(
        experiment, clients={**experiment.clients.model_dump(), "ranks": None}
    ):
        yield "remove clients.ranks"
    yield "choose another method"
    if experiment.privacy.unit == "client":
        yield "set privacy.unit = 'record'"


def _holds(experiment: Experiment, **changes: Any) -> bool:
    """Whether the guarantee holds with other sections, if they are valid."""
    try:
        return refusal(Experiment.model_validate({**experiment.model_dump(), **changes})) is None
    except UserError:
        return False


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _group(name: str) -> str:
    """The factor, or the head, that a tensor of an upload belongs to."""
    return "head" if name.startswith("head/") else name.rpartition(".")[2]
