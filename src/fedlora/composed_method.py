"""The method of an experiment, with everything around it."""

from fedlora.config.experiment import Experiment
from fedlora.method import AnyMethod
from fedlora.methods.wrap.head import with_head
from fedlora.methods.wrap.magnitudes import Magnitudes


def method_of(experiment: Experiment) -> AnyMethod:
    """The experiment's method, with its magnitudes, its head and its wrappers."""
    method, row = experiment.method.make(), experiment.method.row
    if experiment.lora.dora:
        assert row.magnitudes is not None, "an experiment with DoRA has a method that supports it"
        method = Magnitudes(method, row.magnitudes)
    method = with_head(method, experiment.method.head or row.head)
    for wrapper in experiment.wrap:
        method = wrapper.around(method)
    return method
