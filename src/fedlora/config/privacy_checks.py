"""Settings of other sections that do not fit the section `privacy`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlora.config.sections import Sampling

if TYPE_CHECKING:
    from fedlora.config.experiment import Experiment


def privacy_conflicts(experiment: "Experiment") -> Iterator[str]:
    """Yields each setting that does not fit `privacy.unit`, with the reason and what to do."""
    unit, sampling, evaluate = experiment.privacy.unit, experiment.sampling, experiment.evaluate
    if unit == "none":
        return
    if evaluate.stop_after is not None:
        yield (
            f"evaluate.stop_after = {evaluate.stop_after} is not supported by privacy.unit = {unit!r}: the clients' scores "
            "would choose the round, without noise; remove it"
        )
    if evaluate.clients != "none":
        yield (
            f"evaluate.clients = {evaluate.clients!r} is not supported by privacy.unit = {unit!r}: the clients' scores "
            "would be sent without noise; set evaluate.clients = 'none' (the test set is evaluated on the server)"
        )
    if sampling.check_cohort:
        yield (
            f"sampling.check_cohort = true is not supported by privacy.unit = {unit!r}: what is accepted of a client would "
            "depend on the others; remove it"
        )
    if unit != "client":
        return
    if experiment.data.task is not None:
        yield (
            f"data.task = {experiment.data.task!r} is not supported by privacy.unit = 'client': an owner of several tasks "
            "would be several clients, each protected alone; remove it"
        )
    if (largest := experiment.privacy.largest_cohort) is not None:
        if (clients := experiment.clients.size) is None:
            yield (
                f"privacy.largest_cohort = {largest} needs clients.count: the account depends on the number of clients; "
                "set clients.count"
            )
        elif largest < round(expected := sampling.fraction * clients, 9):
            yield (
                f"privacy.largest_cohort = {largest}: expected at least {expected:.4g}, the expected number of clients in "
                f"a round (sampling.fraction = {sampling.fraction:g} of {clients} clients); raise it, or lower "
                "sampling.fraction"
            )
    if sampling.max_norm is not None:
        yield (
            f"sampling.max_norm = {sampling.max_norm:g} is not supported by privacy.unit = 'client': the reasons for "
            "rejections would tell norms without noise; remove it, privacy.clip limits each change"
        )
    for key in ("attempts", "min_replies"):
        value, default = getattr(sampling, key), Sampling.model_fields[key].default
        if value not in (1, default):
            yield (
                f"sampling.{key} = {value} is not supported by privacy.unit = 'client': a round is never repeated, also "
                "if few clients reply; remove it"
            )
