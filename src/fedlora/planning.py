"""The privacy plan of an experiment, and the statement about it, from its settings and the sizes of its clients."""

from collections.abc import Mapping, Sequence

from fedlora.config.experiment import Experiment
from fedlora.encoded_data import EncodedData, encode
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.messages import ClientInfo
from fedlora.privacy.events import Ledger
from fedlora.privacy.plan import PrivacyPlan, client_plan, record_plan, weaknesses
from fedlora.privacy.record import planned_steps
from fedlora.privacy.release import trainings
from fedlora.privacy.statement import OF_NODES, PERSONAL, PUBLIC_COUNTS, WITHOUT_NOISE, NoiseSource, Statement
from fedlora.tasks.table import task_of


def plan_of(experiment: Experiment, examples: Mapping[str, int]) -> PrivacyPlan | None:
    """The plan for clients with these numbers of training examples; None without privacy, or without clients.

    All trainings that the method requests of a client count.
    """
    privacy, rounds, train = experiment.privacy, experiment.rounds, experiment.train
    if privacy.unit == "none" or not examples:
        return None
    if privacy.unit == "client":
        return client_plan(privacy, rounds, experiment.sampling.fraction, len(examples))
    requested = trainings(experiment)

    def steps(count: int) -> int:
        return max(planned_steps(fits, train, count) for fits in requested)

    return record_plan(privacy, rounds, train.batch_size, examples, steps)


def statement_of(
    experiment: Experiment, examples: Mapping[str, int], rounds: int, noise_source: NoiseSource, spent: Ledger | None = None
) -> Statement | None:
    """The statement about a run after this number of rounds; None without privacy, or without clients.

    `spent` has the releases of the client with the largest epsilon (record); without it, the statement is that of the plan.
    """
    plan = plan_of(experiment, examples)
    if plan is None:
        return None
    if plan.unit == "client":
        (one,) = plan.mechanisms
        spent = one.releases(rounds)
    return Statement(plan, noise_source, spent)


def statement_text(
    experiment: Experiment,
    clients: Sequence[ClientInfo],
    rounds: int,
    registered: int | None = None,
    deployed: bool = False,
) -> str | None:
    """The statement in words, for the card of an export; None without privacy.

    `clients` are those of a simulation, `registered` is the number of clients in the account of the rounds.
    """
    unit, personal = experiment.privacy.unit, experiment.method.row.personal
    if unit == "client" and personal:
        return PERSONAL
    if unit == "record" and deployed:
        privacy = experiment.privacy
        before = [WITHOUT_NOISE] if privacy.noise_multiplier == 0 else []
        return " ".join([*before, OF_NODES, *([PUBLIC_COUNTS] if privacy.public_counts else [])])
    examples = {client.id: client.examples for client in clients}
    if registered is not None:
        examples = {str(i): 1 for i in range(registered)}
    found = statement_of(experiment, examples, rounds, "os" if deployed else "seed")
    return None if found is None else found.text()


def weakness_notes(experiment: Experiment, examples: Mapping[str, int]) -> list[str]:
    """What weakens the guarantee, for clients with these numbers of training examples; empty without privacy."""
    privacy = experiment.privacy
    if privacy.unit == "none" or privacy.delta is None or not examples:
        return []
    units = len(examples) if privacy.unit == "client" else max(examples.values())
    return weaknesses(privacy.unit, privacy.delta, units, privacy.noise_multiplier == 0)


def client_sizes(experiment: Experiment) -> dict[str, int]:
    """The number of training examples of each client. Reads the data, but no model weights.

    Raises:
        UserError: invalid data or model, or a server without data.
    """
    if experiment.data.source == "none":
        raise UserError("data.source = 'none': the clients' numbers of examples are not known; give one with --examples")
    federated_data = FederatedData.make(experiment)
    task = task_of(dict(experiment.task))
    model, tokenizer = task.outline(experiment.model, federated_data.labelled_data.labels)
    tokens = encode(task, tokenizer, federated_data, experiment.train.max_length)
    data = EncodedData.of(tokens, model, tokenizer, federated_data, experiment.train.max_length)
    return {client: len(rows) for client, rows in data.rows.items()}
