"""Evaluation of trained adapters on any data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.data.memory import MEMORY
from fedlora.encoded_data import EncodedData, encode
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.generation_setup import generation_of
from fedlora.saved_adapter import SavedAdapter
from fedlora.train.evaluate import test_set_metrics


def evaluate(
    path: str | Path,
    data: Any = None,
    *,
    client: str | None = None,
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = lambda note: None,
) -> Mapping[str, int | float]:
    """The metrics of a trained adapter or model on a data set, as in the rows of a run, and the number of `examples`.

    Args:
        path: the directory of a run, also while it is running, or the folder of an exported adapter or a merged model.
        data: a file, or rows in memory, as in `run`; by default the test set of the run.
        client: the client whose adapter is evaluated, for a personal method.
        overrides: settings as for `--set`, such as `["data.text=body"]` for another column, or
            `["evaluate.generate=100"]` for the metrics of generated answers.
        notify: is called with messages about the examples.

    Raises:
        UserError: no such adapter, or data or settings that cannot be used.
    """
    saved = SavedAdapter.find(path, client, overrides)
    experiment = saved.experiment
    federated_data = _test_set(saved, data)
    loaded = saved.load().merged_base()
    task, adapted, tokenizer = loaded.task, loaded.adapted, loaded.tokenizer
    tokens = encode(task, tokenizer, federated_data, experiment.train.max_length)
    test = EncodedData.of(tokens, adapted.model, tokenizer, federated_data, experiment.train.max_length)
    for note in (*loaded.notes, *test.notes):
        notify(note)
    rows = federated_data.labelled_data.test
    generation = generation_of(experiment, task, adapted.model, tokenizer, test.test, rows)
    found = test_set_metrics(adapted, task, test.test, loaded.adapter, experiment.evaluate.batch_size)
    return found if generation is None else {**found, **generation.scores(generation.answers(adapted, loaded.adapter))}


def _test_set(saved: SavedAdapter, data: Any) -> FederatedData:
    """The given data, or the test set of the run.

    Raises:
        UserError: there is none, or it has changed since the run began.
    """
    if data is not None:
        return FederatedData.of_test_set(saved.experiment, data, saved.labels)
    if saved.manifest is None or saved.experiment.data.source in (MEMORY, "none"):
        raise UserError(f"{saved.path}: has no test set of its own; name a file with --data")
    found = FederatedData.of_server(saved.experiment)
    saved.manifest.require_test_set(found.fingerprint)
    return found
