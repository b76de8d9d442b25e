"""Exports of a run: each adapter in one of the forms, with its model card and settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.adapter import Adapter
from fedlora.errors import UserError
from fedlora.exporting.base_updates import with_base_updates
from fedlora.exporting.card import model_card
from fedlora.exporting.forms import GGUF_ADAPTER, GGUF_MODEL, Dtype, Form, is_whole_model
from fedlora.exporting.gguf_adapter import to_gguf_adapter
from fedlora.exporting.gguf_model import to_gguf_model
from fedlora.exporting.serving import to_serving
from fedlora.exporting.unfit import unfit_for
from fedlora.exporting.usage_file import write_usage
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

    `rows` are the rows of the round log, for the adapter's model card. `dtype` is that of a whole model, by default
    that of its checkpoint.

    Raises:
        UserError: an adapter or the model cannot be represented in the form or in `dtype`.
    """
    if change := session.adapted.base_change:  # others load the adapter on the pretrained weights
        adapters = {name: with_base_updates(adapter, [change]) for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        if reason := unfit_for(to, adapter, session.adapted):
            raise UserError(f"the adapter{f' of client {name!r}' if name else ''} cannot be exported: {reason}")
    folders = {name: out / client_folder(name) if name else out for name in adapters}
    for name, adapter in adapters.items():
        if is_whole_model(to):
            _write_model(session, adapter, folders[name], to, dtype)
        elif to == "gguf-adapter":
            folders[name].mkdir(parents=True, exist_ok=True)
            to_gguf_adapter(adapter, folders[name] / GGUF_ADAPTER, session.adapted)
        else:
            _write_peft(session, adapter, folders[name], to, rows)
    return folders


def _write_peft(session: Session, adapter: Adapter, folder: Path, to: Form, rows: Sequence[RoundRow]) -> None:
    """Writes a PEFT folder with a model card."""
    labels, tokenizer = session.federated_data.labelled_data.labels, session.tokenizer
    base, files = gguf_arguments(locate(session.experiment.model))
    if (kind := session.experiment.quantize) is not None and not files:  # transformers quantizes no GGUF file
        files = {"quantization_config": loading_settings(session.adapted.model, kind, session.adapted.head)}
    arguments = "".join(f", {name}={value!r}" for name, value in files.items())
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    write = to_serving if to == "serving" else to_peft
    write(
        adapter, folder, session.experiment.lora.dropout, base, session.adapted, labels, tokenizer, session.task.peft_type
    )
    code = session.task.loading_code(labels, getattr(tokenizer, "pad_token_id", 0), arguments)
    done = rows[-1].round if rows else session.experiment.rounds
    privacy = statement_text(session.experiment, session.clients, done, session.registered, session.deployed)
    card = model_card(session.experiment, base, session.task.pipeline_tag, code, labels, rows, privacy)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_usage(session.experiment, labels, folder, with_model=True)


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
        folder.mkdir(parents=True, exist_ok=True)
        to_gguf_model(model, folder / GGUF_MODEL, tokenizer, stored, source)
    write_usage(session.experiment, labels, folder, with_model=False)
