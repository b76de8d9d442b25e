"""The privacy of each client's examples, as an experiment plans it."""

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from fedlora.adapter import AdapterSpec
from fedlora.config.experiment import Experiment
from fedlora.messages import ClientInfo, Round
from fedlora.method import AnyMethod, ClientRound
from fedlora.privacy.record import planned_steps, record_privacy
from fedlora.rounds.validator import template_upload
from fedlora.train.record_privacy import RecordPrivacy


def client_privacy(
    experiment: Experiment,
    method: AnyMethod,
    spec: AdapterSpec,
    clients: Sequence[ClientInfo],
    rows: Mapping[str, Sized],
) -> dict[str, RecordPrivacy]:
    """Each client's privacy, for the rounds in which it may take part and the trainings of a participation."""
    participations = experiment.privacy.participations or experiment.rounds
    server = method.init_server(spec, experiment.seed)
    found = {}
    for client in clients:
        if not (examples := len(rows.get(client.id, ()))):
            continue
        initial = method.init_client(spec, client, experiment.seed)
        steps = []
        for index in range(min(2, experiment.rounds)):  # in the first one, a method may do more, or less
            rnd = Round(index, experiment.seed, registered=len(clients), expected_cohort=len(clients))
            requested = list[Any]()
            template_upload(method, ClientRound(spec, client, rnd, method.send(server, client, rnd), initial), requested)
            steps.append(planned_steps(requested, experiment.train, examples))
        found[client.id] = record_privacy(experiment.privacy, experiment.train, examples, participations * max(steps))
    return found
