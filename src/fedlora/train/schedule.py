"""Learning rates over the steps of a round and over the rounds, as fractions of `train.lr`."""

import math

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
