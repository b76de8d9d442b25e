"""The model cards of all forms of an export: statement about privacy, title, and the code that loads it."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from fedlora import Experiment, run
from fedlora.api import export
from fedlora.exporting.forms import Form, is_gguf
from fedlora.privacy.account import epsilon
from fedlora.privacy.events import Gaussian
from fedlora.tasks.table import task_of, tasks
from tiers import fast
from tiny_gguf import tiny_gguf
from tiny_tasks import tiny_task

PRIVATE: dict[str, Any] = {
    "rounds": 1,
    "clients": {"count": 2, "partition": "iid"},
    "train": {"lr": 0.01, "max_steps": 1},
    "evaluate": {"before": False, "clients": "none"},
    "privacy": {"unit": "client", "noise_multiplier": 1.5, "delta": 1e-2, "clip": 0.5},
}
FIRST_LINES = {
    "adapter": ("peft", "LoRA adapter"),
    "serving": ("peft", "LoRA adapter"),
    "merged": ("transformers", "Fine-tuned model"),
    "gguf-adapter": ("gguf", "LoRA adapter"),
    "gguf-merged": ("gguf", "Fine-tuned model"),
}


@pytest.fixture(scope="module")
def private(tmp_path_factory) -> Path:
    """A run of a language model with privacy for clients."""
    home = tmp_path_factory.mktemp("private") / "home"
    given = tiny_task("causal-lm", home)
    data = {"source": given["data"]["source"], "prompt": "prompt", "response": "response"}
    given |= {"model": str(tiny_gguf(home / "base", "llama")), "data": data, **PRIVATE}
    return run(Experiment.model_validate(given), home / "run", progress=False).folder


def privacy_section(card: str) -> str:
    return card.partition("## Privacy\n\n")[2].partition("\n\n")[0]


@pytest.mark.parametrize("form", get_args(Form))
def test_the_card_of_each_form_has_the_runs_statement_and_says_what_it_is(form, private, tmp_path):
    if is_gguf(form):
        pytest.importorskip("gguf")
    export(private, form, tmp_path / "out")
    card, own = ((path / "README.md").read_text() for path in (tmp_path / "out", private / "adapter"))
    assert privacy_section(card) == privacy_section(own)
    assert privacy_section(own).startswith("Differential privacy for each client: epsilon = ")
    library, title = FIRST_LINES[form]
    assert f"\nlibrary_name: {library}\n" in card and f"\n# {title} for text generation\n" in card
    files = re.findall(r"(?:-m|--lora) (\w+\.gguf)", card)
    assert [name for name in files if name != "base.gguf" and not (tmp_path / "out" / name).is_file()] == []
    assert bool(files) == is_gguf(form) == ("```sh\n" in card) != ("```python\n" in card)


def test_a_private_run_that_trains_the_whole_model_is_merged_with_its_statement(tmp_path):
    given = tiny_task("classification", tmp_path / "home") | PRIVATE | {"method": {"name": "full-ft", "scope": "all"}}
    folder = run(Experiment.model_validate(given), tmp_path / "run", progress=False).folder
    export(folder, "merged", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert privacy_section(card).startswith("Differential privacy for each client: epsilon = ")
    assert "all parameters" in card and "rank" not in card and "lora," not in card


@pytest.mark.parametrize("kind", fast(list(tasks()), "tagging"))
def test_the_code_in_the_readme_of_a_merged_model_loads_the_model_of_its_task(kind, trained, monkeypatch):
    one = trained(kind)
    monkeypatch.chdir(one.merged)
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(code, found := dict[str, Any]())
    experiment = Experiment.load(one.run / "experiment.toml")
    labels = list(found["model"].config.id2label.values())
    model, _ = task_of(dict(experiment.task)).outline(experiment.model, labels)
    assert type(found["model"]) is type(model)
    assert {name: x.shape for name, x in found["model"].state_dict().items()} == {
        name: x.shape for name, x in model.state_dict().items()
    }
    assert ("processor" if kind == "image-classification" else "tokenizer") in found


def test_the_model_card_of_a_private_run_states_its_guarantee(trained):
    privacy = {"unit": "client", "noise_multiplier": 1.5, "delta": 1e-2, "clip": 0.5}
    one = trained("classification", privacy=privacy, evaluate={"clients": "none"})
    section = privacy_section((one.adapter / "README.md").read_text())
    assert section.startswith("Differential privacy for each client: epsilon = ") and "\n" not in section
    spent = epsilon([Gaussian(1.5, count=2)], 1e-2)
    for part in (f"{spent:.4g}", "L2 norm 0.5", "2 rounds planned, 2 made", "n = 2 clients", "simulation, no guarantee"):
        assert part in section


def test_the_model_card_of_a_private_run_has_no_number_that_depends_on_who_took_part(trained):
    private = {"unit": "client", "noise_multiplier": 1.5, "delta": 1e-2, "clip": 0.5}
    cards = [
        (trained("classification", **more).adapter / "README.md").read_text()
        for more in ({}, {"privacy": private, "evaluate": {"clients": "none"}})
    ]
    assert ["Clients in the last round" in card for card in cards] == [True, False]
