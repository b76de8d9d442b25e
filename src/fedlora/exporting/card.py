"""Model card of an export: description, training, statement about privacy, and instructions to load it."""

from collections.abc import Sequence
from pathlib import Path

from fedlora.config.experiment import Experiment
from fedlora.exporting.forms import Form, is_gguf, is_whole_model
from fedlora.models import gguf
from fedlora.printable import number
from fedlora.rounds.row import RoundRow
from fedlora.version import __version__

_WITHOUT_PRIVACY = "No differential privacy was used. The trained weights may reveal something about the examples."


def model_card(
    experiment: Experiment,
    form: Form,
    base: str,
    tag: str,
    code: str,
    labels: Sequence[str],
    rows: Sequence[RoundRow],
    privacy: str | None = None,
) -> str:
    """Model card in Markdown.

    `base` is the base model's name or path for PEFT, `tag` the hub's name of the task, `code` loads the export: Python, or
    commands for a GGUF file; `rows` are the rows of the round log, `privacy` is the statement about differential privacy,
    None without it.
    """
    hub = {} if Path(base).is_dir() else {"base_model": base}
    library = "gguf" if is_gguf(form) else "transformers" if form == "merged" else "peft"
    trained = "all parameters" if experiment.method.whole_model else f"rank {experiment.method.rank}"
    tags = "[federated-learning]" if experiment.method.whole_model else "[lora, federated-learning]"
    front = {**hub, "library_name": library, "pipeline_tag": tag, "tags": tags}
    row, data = experiment.method.row, experiment.data
    said = {
        "Base model": f"`{_public(experiment.model)}`" + _quantization(experiment, form),
        "Method": f"`{row.name}` ({row.paper}), {trained}",
        "Data": f"`{_public(data.source)}`" + (f", {len(labels)} labels" if labels else ""),
        **_results(rows),
        "Made with": f"fedlora {__version__}, seed {experiment.seed}",
    }
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in front.items()),
            "---",
            f"# {'Fine-tuned model' if is_whole_model(form) else 'LoRA adapter'} for {tag.replace('-', ' ')}",
            "",
            "Trained by federated fine-tuning: each client's examples remained on that client.",
            "",
            *(f"- {name}: {value}" for name, value in said.items()),
            "",
            "## Privacy",
            "",
            privacy or _WITHOUT_PRIVACY,
            "",
            "## Load it",
            "",
            f"```{'sh' if is_gguf(form) else 'python'}\n{code}```",
            "",
        ]
    )


def _quantization(experiment: Experiment, form: Form) -> str:
    """How the base was quantized in training, and how to load it so."""
    if experiment.quantize is None:
        return ""
    if is_whole_model(form):
        how = "whose dequantized weights this model has"
    elif form == "gguf-adapter":
        how = "whereas llama.cpp adds the adapter to the weights of another file, so that its outputs differ somewhat"
    elif not gguf.is_gguf(experiment.model):
        how = "as the code below loads it"
    else:
        how = (
            "which the code below does not do, as transformers does not quantize GGUF files, so that its outputs differ "
            "somewhat. `fedlora evaluate`, `predict` and `chat` quantize it as in training; a merged export has the "
            "quantized weights"
        )
    return f", quantized to {experiment.quantize} by bitsandbytes, {how}"


def _public(source: str) -> str:
    """The source without its parent folders on this machine."""
    return Path(source).name if Path(source).expanduser().exists() else source


def _results(rows: Sequence[RoundRow]) -> dict[str, str]:
    """Results of the last rounds with an evaluation."""
    if not rows:
        return {}
    found = {"Rounds": str(rows[-1].round)}
    if rows[-1].privacy is None:  # the number of those who took part depends on each of them
        found["Clients in the last round"] = str(len(rows[-1].accepted))
    for row in rows:
        if row.global_ is not None:
            scores = ", ".join(f"{name} {number(value, 4)}" for name, value in row.global_.items() if name != "examples")
            found["Test set"] = f"{scores} after round {row.round}"
        for name, summary in (row.clients or {}).items():
            found[f"Held-out examples of the clients, {name}"] = f"{number(summary.mean, 4)} after round {row.round}"
    return found
