"""Exports of a run: each adapter in one of the forms, with its model card and settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.errors import UserError
from fedlora.exporting.base_updates import with_base_updates
from fedlora.exporting.card import model_card
from fedlora.exporting.forms import GGUF_ADAPTER, GGUF_MODEL, Dtype, Form, is_whole_model
from fedlora.exporting.gguf_adapter import to_gguf_adapter
from fedlora.exporting.gguf_model import to_gguf_model
from fedlora.exporting.serving import to_serving
from fedlora.exporting.unfit import unfit_for
from fedlora.exporting.usage_file import FILE, write_usage
from fedlora.exporting.write import DTYPES, merge, to_merged, to_peft
from fedlora.models.gguf import gguf_arguments
from fedlora.models.loading import locate
from fedlora.models.quantized import loading_settings, round_weights
from fedlora.models.targets import head_modules
from fedlora.planning import statement_text
from fedlora.rounds.row import RoundRow
from fedlora.runs.client_folder import client_folder
from fedlora.session import Session


def write_exports(
    session: Session,
    adapters: Mapping[str, Adapter],
    out: Path,
    to: Form,
    rows: Sequence[RoundRow] = (),
    dtype: Dtype | None = None,
) -> dict[str, Path]:
    """Writes each adapter to `out`, or to a folder in `out` named by its client; returns the folders.

    Each has a model card with the statement about privacy, and the settings with which fedlora uses it. `rows` are those of
    the round log, for the card. `dtype` is that of a whole model, by default that of its checkpoint.

    Raises:
        UserError: an adapter or the model cannot be represented in the form or in `dtype`, or the statement about privacy
            cannot be made.
    """
    if change := session.adapted.base_change:  # others load the adapter on the pretrained weights
        adapters = {name: with_base_updates(adapter, [change]) for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        if reason := unfit_for(to, adapter, session.adapted):
            raise UserError(f"the adapter{f' of client {name!r}' if name else ''} cannot be exported: {reason}")
    folders = {name: out / client_folder(name) if name else out for name in adapters}
    labels = session.federated_data.labelled_data.labels
    for name, adapter in adapters.items():
        folder = folders[name]
        folder.mkdir(parents=True, exist_ok=True)
        if is_whole_model(to):
            _write_model(session, adapter, folder, to, dtype)
        elif to == "gguf-adapter":
            to_gguf_adapter(adapter, folder / GGUF_ADAPTER, session.adapted)
        else:
            _write_peft(session, adapter, folder, to)
        if to != "gguf-adapter":  # which fedlora does not read
            write_usage(session.experiment, labels, folder, with_model=not is_whole_model(to))
        (folder / "README.md").write_text(_card(session, to, rows), encoding="utf-8")
    return folders


def _write_peft(session: Session, adapter: Adapter, folder: Path, to: Form) -> None:
    """Writes a PEFT folder."""
    labels, dropout = session.federated_data.labelled_data.labels, session.experiment.lora.dropout
    write = to_serving if to == "serving" else to_peft
    base, _ = _base(session)
    write(adapter, folder, dropout, base, session.adapted, labels, session.tokenizer, session.task.peft_type)


def _write_model(session: Session, adapter: Adapter, folder: Path, to: Form, dtype: Dtype | None) -> None:
    """Writes the whole model, read again in fp32."""
    source, labels = session.experiment.model, session.federated_data.labelled_data.labels
    model, tokenizer, checkpoint = session.task.load(source, labels, session.experiment.seed)
    if session.experiment.quantize is not None:  # the adapter was trained on the rounded weights
        round_weights(model, session.experiment.quantize, head_modules(model, checkpoint.new))
    stored = DTYPES[dtype] if dtype else checkpoint.dtype
    if to == "merged":
        to_merged(adapter, folder, model, tokenizer, stored)
    else:
        merge(adapter, model, stored)
        to_gguf_model(model, folder / GGUF_MODEL, tokenizer, stored, source)


def _card(session: Session, to: Form, rows: Sequence[RoundRow]) -> str:
    """The model card of a run's export after these rounds, or without them after all.

    Raises:
        UserError: the statement about privacy cannot be made.
    """
    experiment, labels = session.experiment, session.federated_data.labelled_data.labels
    done, private = (rows[-1].round, rows[-1].privacy) if rows else (experiment.rounds, None)
    counted = None if private is None else private.clients
    privacy = statement_text(experiment, session.clients, done, counted, session.deployed)
    if privacy is None and experiment.privacy.unit != "none":  # a private run has a statement
        raise UserError("the run has no round with the number of clients in its account of privacy, which the card states")
    base, _ = _base(session)
    return model_card(experiment, to, base, session.task.pipeline_tag, _code(session, to), labels, rows, privacy)


def _code(session: Session, to: Form) -> str:
    """The program, or the commands, that load an export in its folder."""
    match to:
        case "merged":
            return session.task.merged_code
        case "gguf-adapter":
            return f"llama-cli -m base.gguf --lora {GGUF_ADAPTER}  # base.gguf: the base model, also a quantized one\n"
        case "gguf-merged":
            return f"llama-cli -m {GGUF_MODEL}\nfedlora predict . --data FILE  # columns as in {FILE}\n"
    _, arguments = _base(session)
    if (kind := session.experiment.quantize) is not None and not arguments:  # transformers quantizes no GGUF file
        arguments = {"quantization_config": loading_settings(session.adapted.model, kind, session.adapted.head)}
    written = "".join(f", {name}={value!r}" for name, value in arguments.items())
    labels = session.federated_data.labelled_data.labels
    return session.task.loading_code(labels, getattr(session.tokenizer, "pad_token_id", 0), written)


def _base(session: Session) -> tuple[str, dict[str, Any]]:
    """The base model as PEFT names it, and the further arguments with which transformers loads it."""
    base, arguments = gguf_arguments(locate(session.experiment.model))
    return str(Path(base).resolve()) if Path(base).is_dir() else base, arguments
