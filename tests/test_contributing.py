"""The examples of CONTRIBUTING are complete: copied into the package, they work."""

import re
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from fedlora.adapter import Scaling, pack
from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.messages import Round
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.row import Row
from fedlora.methods.wrap.table import WrapperRow
from fedlora.models.adapted import AdaptedModel
from fedlora.parts import table
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Task

from tiny import tiny_bert, tiny_rows
from toy import SPEC, MemoryStates, Quiet, ToyTrainer, toy_clients, toy_method, toy_plan, toy_simulation

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (\S+?)(?:, in \w+)?\n(.*?)```", TEXT, re.DOTALL)


def example(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the example for this file would be."""
    (code,) = [code for file, code in BLOCKS if file == path]
    name = "example_" + Path(path).stem
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return __import__(name)


def row(path: str, **names: Any) -> Any:
    """The row of a table in the example."""
    (code,) = [code for file, code in BLOCKS if file == path]
    (found,) = eval(f"({code.strip()})", names)
    return found


def test_the_example_of_a_method_runs_and_averages_b_exactly(tmp_path, monkeypatch):
    module = example("src/fedlora/methods/unit_rows.py", tmp_path, monkeypatch)
    entry = row("src/fedlora/methods/table.py", Row=Row, UnitRows=module.UnitRows)
    assert entry.secure_sums() == "yes"
    method, trainer, clients = toy_method(entry), ToyTrainer(), toy_clients(3)
    plan, backend, states = toy_plan(method, trainer), toy_simulation(method, trainer, clients), MemoryStates()
    state, rows = RunState(method.init_server(SPEC, 0)), []
    for index in range(3):
        state, found = one_round(plan, backend, states, state, index, Quiet())
        rows.append(found)
    assert all(found.aggregation_error < 1e-6 for found in rows)
    assert rows[-1].clients["accuracy"].mean > rows[0].clients["accuracy"].mean
    view = backend.view(clients[0], method.send(state.server, clients[0], Round(3, 0)), Round(3, 0))
    for name in SPEC.modules:
        torch.testing.assert_close(view[name].a.norm(dim=1), torch.ones(3))


def test_the_example_of_a_part_computes_and_learns_as_its_matrix(tmp_path, monkeypatch):
    kind, linear = example("src/fedlora/parts/vera.py", tmp_path, monkeypatch).Vera, torch.nn.Linear(7, 5)
    monkeypatch.setattr(table, "Factors", table.Factors | kind)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # annotations made before do not name the kind
    adapted = AdaptedModel(torch.nn.Sequential(linear), Scaling(16.0), ["0"])
    parts = [kind(*(torch.randn(shape) for shape in ((5, rank), (5,), (rank,), (rank, 7)))) for rank in (3, 2)]
    e, d = adapted.load_clients([{"0": part} for part in parts], "de")
    x = torch.randn(4, 7)
    expected = [linear(rows) + rows @ part.product().mT for rows, part in zip(x.split(2), parts, strict=True)]
    torch.testing.assert_close(found := adapted.model(x), torch.cat(expected))
    found.square().sum().backward()
    assert e.grad.all() and d.grad[0].all() and d.grad[1, :2].all() and not d.grad[1, 2:].any()


def test_the_example_of_a_wrapper_trains_b_faster(tmp_path, monkeypatch):
    module = example("src/fedlora/methods/wrap/lora_plus.py", tmp_path, monkeypatch)
    entry = row("src/fedlora/methods/wrap/table.py", WrapperRow=WrapperRow, LoRAPlus=module.LoRAPlus)
    assert entry.settings() == {"ratio": 16.0}
    moved = []
    for ratio in (1.0, 8.0):
        method, client = entry.make(FactorAveraging(rank=3), ratio=ratio), toy_clients(1)[0]
        job = method.work(method.init_client(SPEC, client, 0), method.init_server(SPEC, 0), client, Round(0, 0))
        moved.append(pack(ToyTrainer(steps=1).fit_one(next(job), client).adapter))
    for name in SPEC.modules:  # b starts at zero
        torch.testing.assert_close(moved[1][f"{name}.b"], 8 * moved[0][f"{name}.b"])
        assert torch.equal(moved[1][f"{name}.a"], moved[0][f"{name}.a"])


def test_the_example_of_a_task_trains_with_its_own_loss(tmp_path, monkeypatch):
    module = example("src/fedlora/tasks/smoothed.py", tmp_path, monkeypatch)
    (entry,) = [code for file, code in BLOCKS if file == "src/fedlora/tasks/table.py"]
    found = eval(f"{{{entry.strip()}}}", {"Smoothed": module.Smoothed})
    assert isinstance(found["smoothed"](), Task)
    losses = []
    for task in (found["smoothed"](), Classification()):
        for where in ("fedlora.session.task_of", "fedlora.federated_data.task_of"):
            monkeypatch.setattr(where, lambda settings, task=task: task)
        settings = {
            "model": str(tiny_bert(tmp_path / "model")),
            "data": str(tiny_rows(tmp_path / "train.jsonl", 60)),
            "rounds": 1,
            "clients": {"count": 2, "partition": "iid"},
        }
        result = run(build(settings), tmp_path / f"run{len(losses)}", False)
        losses.append((result.rows[0].global_["loss"], result.rows[-1].train_loss))
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
