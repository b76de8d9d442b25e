"""Python interface: `run`, `resume` and `export`."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedlora.config.experiment import Experiment
from fedlora.data.memory import MEMORY
from fedlora.errors import UserError
from fedlora.exporting.forms import Dtype, Form, is_gguf, is_whole_model
from fedlora.federated_data import FederatedData
from fedlora.lifecycle import begin, final_adapters, finish, require_same, rounds
from fedlora.models import model_copy
from fedlora.models.fingerprint import fingerprint
from fedlora.models.gguf import missing as gguf_missing
from fedlora.printable import listed
from fedlora.report.terminal import shown
from fedlora.reuse import Reuse
from fedlora.rounds.durable import replacing
from fedlora.rounds.early_stopping import until_best
from fedlora.rounds.progress import Progress
from fedlora.run_exports import write_exports
from fedlora.runs.folder import DEPLOY, RunFolder
from fedlora.runs.manifest import Manifest
from fedlora.runs.result import Result
from fedlora.runs.start import extend, new_folder, opened, resolve_settings
from fedlora.session import Session


def run(
    experiment: Experiment | None = None,
    out: str | Path | None = None,
    progress: bool | Progress = True,
    *,
    data: Any = None,
    model: Any = None,
    tokenizer: Any = None,
) -> Result:
    """Runs an experiment from its first round to its exported adapters.

    Args:
        experiment: the settings; by default `Experiment()`.
        out: a new folder for the run; by default in `runs/`.
        progress: whether to show progress, if standard output is a terminal or a notebook; or an object with callbacks.
        data: rows in place of `data.source`: a list of mappings, a `datasets.Dataset`, a `pandas.DataFrame`, or a mapping
            of the splits `train` and `test` to one of these, such as a `DatasetDict`. Only their fingerprint is stored.
        model: a `transformers.PreTrainedModel` in place of the setting `model`. A copy is saved in the run directory.
        tokenizer: the tokenizer or image processor of `model`.

    Raises:
        UserError: the experiment, the data, the model or the folder is invalid; nothing was trained.
        RunStopped: the run cannot continue; `resume` continues it after its last complete round.
    """
    experiment = resolve_settings(experiment or Experiment())
    if data is not None:
        source = experiment.data.model_copy(update={"source": MEMORY})
        experiment = experiment.model_copy(update={"data": source})
    folder = RunFolder.create(Path(out) if out is not None else new_folder(experiment))
    saved_model = folder.path / "model"
    try:
        if model is not None or tokenizer is not None:
            experiment = experiment.model_copy(update={"model": model_copy.save(model, tokenizer, saved_model)})
        with shown(experiment.rounds, progress) as callbacks:
            return finish_run(experiment, folder, callbacks, data)
    finally:
        if not folder.experiment.exists():
            shutil.rmtree(saved_model, ignore_errors=True)
        folder.release()


def resume(
    path: str | Path, progress: bool | Progress = True, overrides: Iterable[str] = (), *, data: Any = None
) -> Result:
    """Resumes a run after its last complete round; the result is identical to that of an uninterrupted run.

    Args:
        path: the run's folder.
        progress: as in `run`.
        overrides: more rounds, as in `["rounds=20"]`; no other setting may change.
        data: the rows passed to `run`, if any, in the same order.

    Raises:
        UserError: not a run directory, locked by another process, a damaged file, or settings, data or model that differ
            from those with which the run began.
        RunStopped: the run cannot continue.
    """
    if overrides:
        extend(Path(path), overrides)
    with opened(Path(path)) as (folder, experiment), shown(experiment.rounds, progress) as callbacks:
        return finish_run(experiment, folder, callbacks, data)


def export(
    path: str | Path, to: Form, out: str | Path, client: str | None = None, dtype: Dtype | None = None
) -> Mapping[str, Path]:
    """Writes a run's current adapter, alone or merged into the model; returns the folders.

    It is that of the best round with `evaluate.stop_after`, else of the last. For a personal method, each client's
    adapter, or only that of `client`, is written to a separate folder. The data are not read: labels and clients are taken
    from the run directory.

    Args:
        path: the run's folder.
        to: "adapter", a PEFT folder; "serving", a PEFT folder of one rank and scale, as vLLM and LoRAX read it; "merged",
            the whole model as a folder of transformers; "gguf-adapter" and "gguf-merged", the same two as the files
            `adapter.gguf` and `model.gguf` for llama.cpp.
        out: a new or empty folder.
        client: the client of a personal method.
        dtype: the data type of a whole model's weights; by default that of the model's checkpoint.

    Raises:
        UserError: no such run or client, no complete round, a damaged file, a changed model, `out` in use, a whole model
            of a personal method without a client, or the adapter cannot be represented in the form.
    """
    if dtype is not None and not is_whole_model(to):
        raise UserError(f"dtype = {dtype!r}: adapters are written in fp32; choose it for a merged model only")
    if is_gguf(to) and (reason := gguf_missing()):
        raise UserError(f"{to}: {reason}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; choose another directory")
    with opened(Path(path)) as (folder, experiment):
        done, run_state = folder.restore()
        manifest = Manifest.find(folder.path)
        if not done or manifest is None:
            raise UserError(f"{path}: has no complete round yet; there is nothing to export")
        if experiment.method.row.personal and (folder.path / DEPLOY).exists():
            raise UserError(f"{path}: every client's own adapter is in its node's folder, in runs/*/adapter")
        manifest.require_model(experiment.model, fingerprint(experiment.model))
        session = Session.make(
            experiment, FederatedData.without_examples(experiment, manifest.data.labels, manifest.clients())
        )
        manifest.require_modules(session.places)
        session = replace(session, deployed=(folder.path / DEPLOY).exists())
        adapters = final_adapters(session, folder, run_state)
        if client is not None:
            if client not in adapters:
                names = [name or "the global adapter (without --client)" for name in adapters]
                raise UserError(f"{client!r}: no client with this name has an adapter; available: {listed(names, 5)}")
            adapters = {"": adapters[client]}
        if is_whole_model(to) and len(adapters) > 1:
            raise UserError(f"{experiment.method.name} has an adapter for each client: choose one with --client")
        try:
            with replacing(out) as partial:
                written = write_exports(session, adapters, partial, to, until_best(folder.rows()), dtype)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
        return {name: out / found.relative_to(partial) for name, found in written.items()}


def finish_run(
    experiment: Experiment, folder: RunFolder, progress: Progress, in_memory: Any = None, reuse: Reuse | None = None
) -> Result:
    """Runs the remaining rounds of the run in this folder, and exports its adapters.

    With `reuse`, values of an earlier run of this process are not computed again.
    """
    federated_data = FederatedData.make(experiment, in_memory, reuse)
    require_same(folder, experiment, federated_data)
    session = Session.make(experiment, federated_data, reuse).on_all_devices()
    run_state = rounds(session, folder, progress, session.simulation(folder), begin(session, folder))
    adapters = final_adapters(session, folder, run_state)
    written, left_out = finish(session, adapters, folder)
    return Result(folder.path, experiment.method.name, folder.rows(), written, left_out)
