"""Model card of an exported adapter: description, training, and instructions to load it."""

from collections.abc import Sequence
from pathlib import Path

from fedlora.config.experiment import Experiment
from fedlora.rounds.row import RoundRow
from fedlora.version import __version__

_LOAD = """\
```python
import json
from pathlib import Path

from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder = Path()  # where this file is
labels = dict(enumerate(json.loads((folder / "labels.json").read_text())))
model = AutoPeftModelForSequenceClassification.from_pretrained(
    folder, num_labels={classes}, id2label=labels, pad_token_id={pad}, ignore_mismatched_sizes=True
)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""


def model_card(experiment: Experiment, base: str, pad: int, labels: Sequence[str], rows: Sequence[RoundRow]) -> str:
    """Model card in Markdown. `base` is the base model's name or path for PEFT; `rows` are the rows of the round log."""
    hub = {} if Path(base).is_dir() else {"base_model": base}
    front = {**hub, "library_name": "peft", "pipeline_tag": "text-classification", "tags": "[lora, federated-learning]"}
    row, data = experiment.method.row, experiment.data
    said = {
        "Base model": f"`{_public(experiment.model)}`",
        "Method": f"`{row.name}` ({row.paper}), rank {experiment.method.rank}",
        "Data": f"`{_public(data.source)}`, {len(labels)} labels",
        **_results(rows),
        "Made with": f"fedlora {__version__}, seed {experiment.seed}",
    }
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in front.items()),
            "---",
            "# LoRA adapter for text classification",
            "",
            "Trained by federated fine-tuning: each client's examples remained on that client.",
            "",
            *(f"- {name}: {value}" for name, value in said.items()),
            "",
            "## Privacy",
            "",
            "No differential privacy was used. An adapter may reveal something about the examples it was trained on.",
            "",
            "## Load it",
            "",
            _LOAD.format(classes=len(labels), pad=pad),
            "",
        ]
    )


def _public(source: str) -> str:
    """The source without its parent folders on this machine."""
    return Path(source).name if Path(source).expanduser().exists() else source


def _results(rows: Sequence[RoundRow]) -> dict[str, str]:
    """Results of the last rounds with an evaluation."""
    if not rows:
        return {}
    found = {"Rounds": str(rows[-1].round), "Clients in the last round": str(len(rows[-1].accepted))}
    for row in rows:
        if row.global_ is not None:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in row.global_.items() if isinstance(value, float))
            found["Test set"] = f"{scores} after round {row.round}"
        for name, summary in (row.clients or {}).items():
            found[f"Held-out examples of the clients, {name}"] = f"{summary.mean:.4f} after round {row.round}"
    return found
