"""The number of steps of a client's training."""

from fedlora.config.sections import Train
from fedlora.messages import Fit


def steps_per_epoch(settings: Train, examples: int) -> int:
    """Number of batches in an epoch."""
    return -(-examples // settings.batch_size)


def number_of_steps(request: Fit, settings: Train, examples: int) -> int:
    """Number of batches: the requested one, else that of the requested epochs, else the run's."""
    if request.epochs is None and (steps := request.steps or settings.max_steps):
        return steps
    epochs = settings.epochs if request.epochs is None else request.epochs
    return epochs * steps_per_epoch(settings, examples)
