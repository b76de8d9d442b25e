"""Training of many clients' adapters in one forward and backward pass of the shared model."""

from collections.abc import Sequence

from fedlora.adapter import Adapter, pack
from fedlora.config.sections import Train
from fedlora.messages import Trained
from fedlora.models.adapted import AdaptedModel
from fedlora.models.dropout import ClientDropout
from fedlora.tasks.task import Examples, Task
from fedlora.train.gradient_filter import filter_gradients
from fedlora.train.job import Job, step_key
from fedlora.train.optimizer import MaskedParameter, clip_gradients, make_optimizer, optimizer_step, replace_parameters
from fedlora.train.private_gradients import PrivateGradients
from fedlora.train.schedule import step_rate
from fedlora.train.step_gradients import MeanGradients, StepGradients, Training


def train_together(
    adapted: AdaptedModel,
    task: Task,
    examples: Examples,
    jobs: Sequence[Job],
    settings: Train,
    max_tokens: int,
    dropout: float | None = None,
) -> list[Trained]:
    """Trains each client according to its request, with a new optimizer, independently of the other clients.

    A step descends the mean loss of the client's batch, over its targets or over its examples (`settings.reduction`).
    All requests have the same `step_key`. One step takes the next batch of every client that still has one; factors,
    heads and optimizer states have a client axis. The base processes the batches in micro-batches of at most
    `max_tokens` (padding included) with batches of similar length; a single batch is split only with `train.accumulate`.
    Jobs with `privacy` make the steps of `PrivateGradients` instead, to which all `settings` but those of batches apply.
    The order of a client's examples and its dropout depend on its own seeds alone. The last batch of an epoch may be
    smaller. `dropout` replaces all nonzero probabilities of the model and the LoRA layers.
    """
    requests = [job.request for job in jobs]
    assert len({step_key(request) for request in requests}) == 1, "requests of several kinds cannot be trained together"
    train = requests[0].train
    parameters = adapted.load_clients([r.start for r in requests], train, [r.frozen_extra for r in requests])
    keys = [key for key in pack(requests[0].start) if key.rpartition(".")[2] in train]
    named = dict(zip(keys, parameters, strict=True))
    optimizer = make_optimizer(settings, named, requests[0].rates or {})
    masked = [
        MaskedParameter.of(x, key, requests) for key, x in named.items() if any(key in (r.mask or {}) for r in requests)
    ]
    device = parameters[0].device
    steps = [job.steps(settings) for job in jobs]
    done: dict[int, Adapter] = {}
    active = list(range(len(jobs)))

    def read(place: int, i: int) -> Adapter:
        return requests[i].restore(adapted.read(place, requests[i].start, requests[i].train))

    adapted.model.train()
    with ClientDropout(adapted.packing, dropout) as client_dropout:
        adapted.checkpointing.modes = (client_dropout, adapted.packing, *adapted.in_place)
        training = Training(adapted, task, examples, jobs, settings, max_tokens, client_dropout, device)
        gradients: StepGradients = MeanGradients(training) if jobs[0].privacy is None else PrivateGradients(training)
        for step in range(max(steps)):
            if len(unfinished := [i for i in active if steps[i] > step]) < len(active):
                done |= {i: read(place, i) for place, i in enumerate(active) if steps[i] == step}
                remaining = [active.index(i) for i in unfinished]
                new = dict(adapted.select_clients(remaining))
                replace_parameters(optimizer, new, remaining)
                masked = [fixed.select_clients(new[fixed.parameter], remaining) for fixed in masked]
                named = {key: new[x] for key, x in named.items()}
                active = unfinished
            now = requests[0].trained_in(step)
            for key, parameter in named.items():
                parameter.requires_grad_(key.rpartition(".")[2] in now)
            gradients.add(step, active, named, masked)
            for place, i in enumerate(active):
                adapted.add_to_gradient(place, requests[i].correction or {}, now)
            for fixed in masked:
                fixed.clear_gradient()
            if settings.clip_norm is not None:
                clip_gradients(optimizer, settings.clip_norm)
            filter_gradients(named, requests[0].gradient_filter)
            optimizer_step(optimizer, [step_rate(settings, step, steps[i]) for i in active])
            optimizer.zero_grad()
            for fixed in masked:
                fixed.restore()
    done |= {i: read(place, i) for place, i in enumerate(active)}
    losses = gradients.losses()
    return [Trained(done[i], losses[i], steps[i]) for i in range(len(jobs))]
