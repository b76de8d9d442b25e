"""Learning rates over the steps of a round and over the rounds, as fractions of `train.lr`."""

import math
from collections.abc import Mapping, Sized

from fedlora.config.sections import Schedule, Train


def warmup_steps(warmup: int | float, steps: int) -> int:
    """The number of warmup steps: `warmup`, or, below 1, that fraction of the steps, rounded up."""
    return int(warmup) if warmup >= 1 else math.ceil(steps * warmup)


def decay(schedule: Schedule, step: int, steps: int, warmup: int = 0) -> float:
    """The factor of the learning rate at a step, counted from 0: transformers' `get_*_schedule_with_warmup`."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1 - progress)
        case "cosine":
            return max(0.0, (1 + math.cos(math.pi * progress)) / 2)


def step_rate(settings: Train, step: int, steps: int) -> float:
    """The factor of the learning rate at a step of a client that makes this number of steps."""
    return decay(settings.schedule, step, steps, warmup_steps(settings.warmup, steps))


def round_rate(settings: Train, index: int, rounds: int) -> float:
    """The factor of the learning rate in the round with this index, counted from 0."""
    return settings.min_lr_rate + (1 - settings.min_lr_rate) * decay(settings.round_schedule, index, rounds)


def schedule_notes(settings: Train, rows: Mapping[str, Sized]) -> list[str]:
    """Messages for the user about settings without effect, and clients that do not train; `rows` are the clients'."""
    notes = []
    if settings.max_steps is not None and settings.epochs > 1:
        notes.append(f"train.max_steps = {settings.max_steps}: train.epochs = {settings.epochs} has no effect")
    steps = [settings.max_steps or settings.epochs * -(-len(own) // settings.batch_size) for own in rows.values()]
    if settings.warmup and (idle := sum(count == 1 for count in steps)):
        notes.append(
            f"train.warmup: {idle} of {len(steps)} clients make one step in a round, whose learning rate is 0; they do not "
            "train"
        )
    return notes
