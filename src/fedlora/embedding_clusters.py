"""Clusters of the training examples by their embeddings in the base model, for a partition without labels."""

import gc
import json
from dataclasses import replace
from importlib.metadata import version

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from fedlora.cache import cached
from fedlora.config.experiment import Experiment
from fedlora.data.fingerprint import fingerprint as data_fingerprint
from fedlora.data.sources import LabelledData, column_values
from fedlora.errors import UserError
from fedlora.linalg.kmeans import kmeans
from fedlora.loaded_model import LoadedModel
from fedlora.models.fingerprint import fingerprint as model_fingerprint
from fedlora.models.loading import quiet
from fedlora.models.tokenizers import check_lengths, positions
from fedlora.randomness import derive
from fedlora.tasks.table import task_of
from fedlora.tasks.task import Examples
from fedlora.train.features import features

_BATCH_SIZE = 64


def embedding_clusters(experiment: Experiment, labelled_data: LabelledData) -> list[int]:
    """The cluster of each training example: k-means of its features (`Task.features`) in the base model.

    The base model computes in fp32, whatever `train.precision`, and without packing, so that the clusters depend on the
    model, the examples, `[task]`, `train.max_length`, `clients.clusters` and the seed alone. The features are cached.

    Raises:
        UserError: invalid model or device, too few examples, examples that the model cannot read, or features that are not
            finite.
    """
    count, train = experiment.clients.clusters, labelled_data.train
    if count > len(train):
        raise UserError(f"clients.clusters = {count}: the training set has {len(train)} examples; lower it")
    key = [
        version("transformers"),
        json.dumps(model_fingerprint(experiment.model)),
        experiment.task.model_dump_json(),
        str(experiment.train.max_length),
        data_fingerprint(train),
    ]
    content = cached("embeddings", key, lambda: save({"features": _embeddings(experiment, labelled_data)}))
    gc.collect()  # models are part of reference cycles, and the run loads its own
    found = load(content)["features"]
    if bad := int((~found.isfinite().all(1)).sum()):
        raise UserError(
            f"clients.partition = 'clusters': the model's features of {bad} of {len(found)} training examples are not "
            "finite; choose another partition"
        )
    # in fp64, as the order of sums depends on the number of threads
    groups: list[int] = kmeans(found.double(), count, derive(experiment.seed, "clusters")).tolist()
    return groups


def _embeddings(experiment: Experiment, labelled_data: LabelledData) -> Float[Tensor, "examples width"]:
    task = task_of(dict(experiment.task))
    plain = {"precision": "fp32", "packed": False, "clients_per_step": 1}
    settings = experiment.model_copy(update={"train": experiment.train.model_copy(update=plain)})
    quiet()
    loaded = LoadedModel.load(task, settings, labelled_data.labels)
    if not loaded.adapted.spec.features:
        raise UserError(
            f"clients.partition = 'clusters': model = {experiment.model!r} does not state the width of its features "
            "(hidden_size in config.json); choose another partition"
        )
    max_length = experiment.train.max_length
    examples = task.encode(loaded.tokenizer, column_values(labelled_data.train), max_length)
    if examples.block_length is not None:
        examples = _beginnings(examples, examples.block_length)
    check_lengths(examples.lengths(), max_length, positions(loaded.adapted.model))
    return features(loaded.adapted, task, examples, torch.arange(len(examples)), _BATCH_SIZE)


def _beginnings(examples: Examples, length: int) -> Examples:
    """The first tokens of each text, without targets."""
    sizes = examples.lengths().clamp(max=length)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    at = torch.arange(int(starts[-1])) + (examples.starts[:-1] - starts[:-1]).repeat_interleave(sizes)
    inputs = {name: x[at] for name, x in examples.features.items()}
    return replace(examples, features=inputs, starts=starts, targets=torch.zeros(len(sizes)), target_starts=None)
