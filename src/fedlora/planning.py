"""The privacy plan of an experiment, and the statement about it, from its settings and the sizes of its clients."""

from collections.abc import Callable, Mapping
from functools import partial

from fedlora.config.experiment import Experiment
from fedlora.encoded_data import EncodedData, encode
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.privacy.events import Gaussian
from fedlora.privacy.plan import PrivacyPlan, client_plan, record_plan
from fedlora.privacy.statement import Statement
from fedlora.tasks.table import task_of


def plan_of(
    experiment: Experiment, examples: Mapping[str, int], steps: Callable[[int], int] | None = None
) -> PrivacyPlan | None:
    """The plan for clients with these numbers of training examples; None without privacy, or without clients.

    `steps` maps a number of examples to the largest number of a client's steps in a round, by default that of one training.
    """
    privacy, rounds = experiment.privacy, experiment.rounds
    if privacy.unit == "none" or not examples:
        return None
    if privacy.unit == "client":
        return client_plan(privacy, rounds, experiment.sampling.fraction, len(examples))
    return record_plan(
        privacy, rounds, experiment.train.batch_size, examples, steps or partial(_steps_of_one_training, experiment)
    )


def statement_of(experiment: Experiment, examples: Mapping[str, int], rounds: int) -> Statement | None:
    """The statement about a simulation after this number of rounds; None without privacy, or without clients."""
    plan = plan_of(experiment, examples)
    if plan is None:
        return None
    spent = None
    if plan.unit == "client":
        (one,) = plan.mechanisms
        spent = [Gaussian(one.noise_multiplier, one.rate, rounds)]
    return Statement(plan, "seed", spent)


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


def _steps_of_one_training(experiment: Experiment, examples: int) -> int:
    train = experiment.train
    return train.max_steps or train.epochs * -(-examples // train.batch_size)
