"""FedAvg of the weights themselves."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from transformers import BertConfig

from fedlora.adapter import Scaling
from fedlora.config.experiment import build
from fedlora.config.sections import Train
from fedlora.data.files import columns
from fedlora.errors import UserError
from fedlora.messages import ClientInfo, Reply, Round, Upload
from fedlora.method import global_adapter
from fedlora.methods.full import FullFineTuning
from fedlora.methods.wrap.head import with_head
from fedlora.models.adapted import AdaptedModel
from fedlora.models.targets import head_modules
from fedlora.parts.weight_change import WeightChange
from fedlora.rounds.client import ClientStart, train_clients
from fedlora.tasks.classification import Classification
from fedlora.train.features import try_packing
from fedlora.train.local import LocalTrainer

from merging import merge
from tiny import LABELS, tiny_bert, tiny_model, tiny_rows
from toy import toy_clients
from uploads import ROUND, SPEC, merged_by

TASK = Classification()


def test_the_mean_of_the_weights_is_exact():
    clients, seed = toy_clients(3), torch.Generator().manual_seed(0)
    sent = [{f"{n}.delta": torch.randn(size, generator=seed) for n, size in SPEC.modules.items()} for _ in clients]
    replies = [Reply(c, ROUND, Upload(x), float(c.examples)) for c, x in zip(clients, sent, strict=True)]
    merged, total = merged_by(FullFineTuning(), replies), sum(client.examples for client in clients)
    for key, x in merged.server.items():
        assert_close(x, sum(c.examples / total * each[key] for c, each in zip(clients, sent, strict=True)))
    assert merged.notes["aggregation_error"] < 1e-6


def test_the_change_has_the_gradient_of_the_weight_itself_whatever_alpha_and_dropout():
    net = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5))
    x, adapted = torch.randn(6, 7), AdaptedModel(copy.deepcopy(net), Scaling(24.0), ["0", "2"], dropout=0.9)
    trained = adapted.load_clients([{name: WeightChange(torch.zeros(size)) for name, size in sizes(adapted)}], {"delta"})
    adapted.model.train()(x).square().sum().backward()
    net(x).square().sum().backward()
    for parameter, layer in zip(trained, (net[0], net[2]), strict=True):
        assert_close(parameter.grad[0], layer.weight.grad)


def sizes(adapted: AdaptedModel) -> list[tuple[str, tuple[int, int]]]:
    return list(adapted.spec.modules.items())


@dataclass(frozen=True)
class Whole:
    """A tiny classifier in fp64, with places for all its parameters, and clients with one batch each."""

    plain: Any
    adapted: AdaptedModel
    trainer: LocalTrainer
    clients: list[ClientInfo]

    @classmethod
    def of(cls, folder: Path, sizes: list[int]) -> "Whole":
        source = tiny_bert(folder / "bert", hidden=16)
        tiny_model(source, BertConfig.from_pretrained(source, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        table = columns(tiny_rows(folder / "rows.jsonl", sum(sizes)), "data.source")
        table["label"] = [LABELS.index(label) for label in table["label"]]
        plain, tokenizer, checkpoint = TASK.load(str(source), LABELS, seed=0)
        plain, examples = plain.double(), TASK.encode(tokenizer, table, 64)
        head = head_modules(plain, checkpoint.new)
        adapted = AdaptedModel(copy.deepcopy(plain), Scaling(16.0), head=head, whole=True)
        adapted.spec = replace(adapted.spec, dtype=torch.float64)
        try_packing(adapted, TASK, tokenizer, 64)
        assert adapted.packing.works
        clients = [ClientInfo(str(i), 8, size) for i, size in enumerate(sizes)]
        rows = dict(zip([c.id for c in clients], torch.arange(sum(sizes)).split(sizes), strict=True))
        settings = Train(lr=1e-3, epochs=3, batch_size=max(sizes))
        return cls(plain, adapted, LocalTrainer(adapted, TASK, examples, rows, rows, examples, settings, 16), clients)

    def federated(self, rounds: list[list[int]]) -> dict[str, Tensor]:
        """All parameters after rounds with these clients."""
        method, spec = with_head(FullFineTuning(scope="all"), "averaged"), self.adapted.spec
        server = method.init_server(spec, 0)
        for index, chosen in enumerate(rounds):
            rnd, clients = Round(index, 0), [self.clients[i] for i in chosen]
            starts = [ClientStart(c, method.init_client(spec, c, 0), method.send(server, c, rnd)) for c in clients]
            done = train_clients(method, self.trainer, starts, rnd)
            replies = [Reply(c, rnd, one.upload, float(c.examples)) for c, one in zip(clients, done, strict=True)]
            merged = merge(method, server, replies, spec)
            server = merged.server
            assert merged.notes["aggregation_error"] < 1e-6
        adapter = global_adapter(method, spec, server, Round(len(rounds), 0))
        before = dict(self.plain.named_parameters())
        return {
            name if part.in_head else f"{name}.weight": part.w if part.in_head else before[f"{name}.weight"] + part.delta
            for name, part in adapter.items()
        }

    def by_hand(self, rounds: list[list[int]]) -> dict[str, Tensor]:
        """The same with a loop over all parameters of the plain model."""
        model = copy.deepcopy(self.plain).eval().requires_grad_(True)
        for chosen in rounds:
            trained = []
            for client in chosen:
                own = copy.deepcopy(model)
                optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3, weight_decay=0.0)
                inputs, targets = self.trainer.examples.batch(self.trainer.rows[str(client)], torch.device("cpu"))
                for _ in range(3):
                    functional.cross_entropy(own(**inputs).logits, targets).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                trained.append((self.clients[client].examples, dict(own.named_parameters())))
            total = sum(weight for weight, _ in trained)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(sum(weight / total * own[name] for weight, own in trained))
        return dict(model.named_parameters())


@pytest.mark.parametrize("rounds", [[[0], [0]], [[0, 2], [1, 2], [0]]], ids=["one client", "some of three in each round"])
def test_all_parameters_are_trained_and_averaged_as_by_hand(rounds, tmp_path):
    whole = Whole.of(tmp_path, [6, 9, 4])
    found, expected = whole.federated(rounds), whole.by_hand(rounds)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(found[name], x.data, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    start = dict(whole.plain.named_parameters())
    still = [name for name, x in expected.items() if torch.equal(x, start[name])]
    assert still == [], "the loop trains all parameters"


@pytest.mark.parametrize("head", ["frozen", "local"])
def test_all_parameters_are_averaged_only_with_the_head(head):
    with pytest.raises(UserError, match=f"head = '{head}': full-ft, as set, averages all parameters, .*: averaged$"):
        build({"method": {"name": "full-ft", "scope": "all", "head": head}})
    assert build({"method": {"name": "full-ft", "head": head}}).method.head == head
