"""The agreement of a node's owner to a run: by the policy, by a flag, or by an answer that is remembered."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlora.config.experiment import Experiment
from fedlora.deploy.policy import column_names, refusals
from fedlora.deploy.reasons import NodeFailure, Reason
from fedlora.deploy.settings import ACCEPTED, Settings
from fedlora.privacy.release import leaving
from fedlora.rounds import durable

_WAY_OUT = (
    "the experiment is not accepted; start fedlora join on a terminal to be asked again, with --policy FILE to allow only "
    "what the file says, or with --accept to allow everything"
)


def agree(
    experiment: Experiment,
    settings: Settings,
    folder: Path,
    notify: Callable[[str], None],
    confirm: Callable[[str], bool] | None,
) -> None:
    """Returns if the node may take part in a run, of which this is the folder; asks its owner at most once per run.

    The answer is valid as long as the server asks for the same: for all settings, also those that are not printed.
    `confirm` asks the owner; None without a terminal.

    Raises:
        NodeFailure: the policy or the owner does not allow it; `notify` receives the reasons.
    """
    if settings.policy is not None:
        if found := list(refusals(settings.policy, experiment)):
            for refusal in found:
                notify(f"{refusal.reason.value}: the experiment {refusal.text}")
            raise NodeFailure(found[0].reason)
        return
    terms, accepted = describe(experiment, settings.data is not None), folder / ACCEPTED
    text = "\n".join([*terms, f"all settings: {_digest(experiment)}"])
    if settings.accept or (accepted.exists() and accepted.read_text(encoding="utf-8") == text):
        return
    for line in terms:
        notify(line)
    if confirm is None or not confirm("take part in this run?"):
        notify(_WAY_OUT)
        raise NodeFailure(Reason.TERMS)
    durable.replace(accepted, text.encode(), mode=0o600)


def _digest(experiment: Experiment) -> str:
    """Of all settings but the node's own data and the server's waiting times."""
    table = experiment.model_dump(mode="json", exclude={"data", "deploy"})
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def describe(experiment: Experiment, own_file: bool) -> Sequence[str]:
    """Lines about what a server asks of the node, and what the node would allow without a policy."""
    clients, privacy, train = experiment.clients.size, experiment.privacy, experiment.train
    length = f"{train.epochs} epoch(s)" if train.max_steps is None else f"{train.max_steps} step(s)"
    source = "this node's file" if own_file else f"its part of {experiment.data.source}"
    if privacy.unit == "none":
        protection = "none"
    else:
        strength = f"epsilon {privacy.epsilon:g}" if privacy.epsilon else f"noise multiplier {privacy.noise_multiplier:g}"
        by = "this node" if privacy.unit == "record" else "the server"
        limits = [f"clip {privacy.clip:g}"]
        if privacy.clip_quantile is not None:
            limits[0] += f", adapted to the quantile {privacy.clip_quantile:g} of the norms of the clients' changes"
        if privacy.largest_cohort is not None:
            limits.append(f"at most {privacy.largest_cohort} clients in a round")
        if privacy.participations is not None:
            limits.append(f"at most {privacy.participations} rounds of a client")
        if privacy.public_counts:
            limits.append("numbers of examples are public")
        protection = f"{privacy.unit}, {strength}, delta {privacy.delta:g}, {'; '.join(limits)}; the noise is added by {by}"
    return [
        "the server asks for:",
        f"  method      {experiment.method.name}, rank {experiment.method.rank}",
        f"  task        {experiment.task.kind}, on the columns {', '.join(column_names(experiment))} of {source}",
        f"  model       {experiment.model}",
        f"  rounds      {experiment.rounds}, of {'an unknown number of' if clients is None else clients} clients",
        f"  training    {length} in a round, in batches of {train.batch_size}",
        f"  privacy     {protection}",
        "it receives:",
        *(f"  {line}" for line in _leaves(experiment)),
        "without --policy, this node allows all methods, tasks, columns and models, any number of rounds and bytes, "
        "uploads that the server sees one by one, and any loss of privacy",
    ]


def _leaves(experiment: Experiment) -> list[str]:
    """What the server receives from a client."""
    if experiment.privacy.unit != "none":
        found = leaving(experiment).values()
        return [f"{one.what}: {one.rule}" for one in found if not one.rule.startswith("not sent")]
    scores = experiment.evaluate.clients != "none" and experiment.clients.held_out
    return [
        "the trained tensors, the number of examples, the training loss and the number of steps",
        *(["scores on held-out examples"] if scores else []),
        "name and rank; the code of a failure; the time of a reply",
    ]
