"""The laws of a real model: every row of the table trained on a tiny transformer, against dense weights in a plain one.

No law asks for a method's name.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from fedlora.adapter import Adapter, AdapterSpec, pack
from fedlora.config.sections import Train
from fedlora.data.files import columns
from fedlora.exporting.base_updates import with_base_updates
from fedlora.exporting.write import to_merged, to_peft, unfit
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, FitRequest, Gradient, LabelledFeatures, Round, Statistics, Trained
from fedlora.methods.row import Row
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.targets import head_modules, norm_modules
from fedlora.parts.dense import Dense
from fedlora.parts.table import Factors
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState
from fedlora.rounds.simulate import SimulationBackend
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.features import try_packing
from fedlora.train.local import LocalTrainer

from plain import PlainModel
from test_laws import CASES, DORA, MIXED, every_row
from tiny import LABELS, tiny_bert, tiny_rows
from toy import DoraRow, MemoryStates, Quiet, toy_method, toy_plan

TASK = Classification()
ALPHA = 5.0  # of no client's rank
TARGETS = r".*\.(0\.attention\.self\.query|0\.output\.dense|1\.intermediate\.dense)"  # [16, 16], [16, 64] and [64, 16]
SIZES = (6, 9, 4)  # the clients' training examples: one batch each
ROUNDS = 3
ASKING = {"train_sent_only": True, "density_down": 0.8, "choose": "gradient"}
"""Settings under which a method asks for more of its trainer."""
SETTINGS = Train(lr=0.02, weight_decay=0.1, batch_size=max(SIZES))


@dataclass(frozen=True)
class Checked:
    """Two numbers or tensors that should be the same: what the trainer found, and what dense weights give."""

    what: str
    found: Any
    expected: Any


@dataclass
class Witness:
    """A real trainer, each of whose answers is put beside that of a plain model."""

    inner: LocalTrainer
    plain: PlainModel
    checked: list[Checked] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)
    fits: list[tuple[Fit, Adapter]] = field(default_factory=list)

    @property
    def spec(self) -> AdapterSpec:
        return self.inner.adapted.spec

    @property
    def clients_per_step(self) -> int:
        return self.inner.clients_per_step

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> list[Trained]:
        """Each client has one batch, and so the loss of an only epoch is that of the start."""
        expected = [
            self._loss(self.inner.rows[one.client.id], one.request.start, one.request.frozen_extra) for one in asked
        ]
        answers = self.inner.fit(asked, rnd)
        for one, found, loss in zip(asked, answers, expected, strict=True):
            assert one.request.epochs in (None, 1)
            self.checked.append(Checked(f"{rnd}: what {one.client} trains from", found.loss, loss))
            self.fits.append((one.request, found.adapter))
        return answers

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        found = self.inner.gradient(client, request)
        slopes = self.plain.gradient(self._batch(self.inner.rows[client.id]), request.start, request.train)
        packed = pack(found)
        self.gradients.append(request)
        self.checked += [Checked(f"{client}: gradient of {key}", packed[key], slope) for key, slope in slopes.items()]
        return found

    def features(self, client: ClientInfo) -> LabelledFeatures:
        seen, (inputs, targets) = self.inner.features(client), self._batch(self.inner.rows[client.id])
        self.checked.append(Checked(f"{client}: features", seen.features, self.plain.features(inputs).float()))
        self.checked.append(Checked(f"{client}: labels", seen.labels, targets))
        return seen

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        self.inner.merge_into_base(change)
        self.plain.add(change)

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> list[Statistics | None]:
        scores = self.inner.scores(asked)
        for (client, view), score in zip(asked, scores, strict=True):
            found = None if score is None else TASK.metrics(score)["loss"]
            self.checked.append(Checked(f"what {client} uses", found, self._loss(self.inner.held_out[client.id], view)))
        return scores

    def evaluate(self, adapter: Adapter) -> Mapping[str, float]:
        score, test = self.inner.evaluate(adapter), torch.arange(len(self.inner.test))
        self.checked.append(Checked("the global model", score["loss"], self._loss(test, adapter)))
        return score

    def _loss(self, rows: Tensor, adapter: Adapter, frozen_extra: Mapping[str, LowRank] | None = None) -> float:
        with torch.no_grad():
            return float(self.plain.loss(self._batch(rows), adapter, frozen_extra))

    def _batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return self.inner.examples.batch(rows, torch.device("cpu"))


@dataclass(frozen=True)
class Loaded:
    """A model and examples; the model's head are these modules."""

    source: str
    model: Any
    tokenizer: Any
    head: tuple[str, ...]
    examples: Examples


@dataclass(frozen=True)
class Game:
    """What is left after the rounds of a row."""

    trainer: Witness
    views: Mapping[str, Adapter]
    states: MemoryStates
    loaded: Loaded


Games = Callable[[Row, Sequence[int]], Game]


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Games:
    """Plays a row, once."""
    folder = tmp_path_factory.mktemp("real layer")
    source = base(folder / "bert")
    table = columns(tiny_rows(folder / "rows.jsonl", sum(SIZES) + 12), "data.source")
    table["label"] = [LABELS.index(label) for label in table["label"]]
    model, tokenizer, checkpoint = TASK.load(source, LABELS, seed=0)
    head = head_modules(model, checkpoint.new)
    loaded = Loaded(source, model.double(), tokenizer, head, TASK.encode(tokenizer, table, 64))
    played: dict[tuple[str, tuple[int, ...]], Game] = {}

    def run_rounds(row: Row, ranks: Sequence[int]) -> Game:
        if (key := (row.name, tuple(ranks))) not in played:
            played[key] = game_of(row, ranks, loaded)
        return played[key]

    return run_rounds


def base(folder: Path) -> str:
    """Writes a model without dropout, whose weights are large enough for a change of one to be seen in the logits."""
    tiny_bert(folder, hidden=16)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig.from_pretrained(folder, initializer_range=0.3, **none)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return str(folder)


def game_of(row: Row, ranks: Sequence[int], loaded: Loaded) -> Game:
    """Some rounds with clients of these ranks in turn, in fp64; one module has a rank of its own."""
    model, head = copy.deepcopy(loaded.model), loaded.head
    head += norm_modules(model, head) if row.norms else ()
    adapted = AdaptedModel(
        model,
        Scaling(ALPHA),
        TARGETS,
        rank_pattern={"output.dense": 2},
        head=head,
        classes=len(LABELS),
        dora=isinstance(row, DoraRow),
    )
    adapted.spec = replace(adapted.spec, dtype=torch.float64)
    try_packing(adapted, TASK, loaded.tokenizer, 64)
    clients = [ClientInfo(str(i), ranks[i % len(ranks)], size) for i, size in enumerate(SIZES)]
    trainer = Witness(trainer_of(adapted, loaded.examples, clients), PlainModel(loaded.model))
    method, states = toy_method(row, **{key: x for key, x in ASKING.items() if key in row.settings()}), MemoryStates()
    simulation = SimulationBackend(method, trainer.spec, clients, states, trainer, seed=0)
    plan, progress = (
        toy_plan(method, trainer, rounds=ROUNDS, metrics=TASK.metrics),
        RunState(method.init_server(trainer.spec, 0)),
    )
    for index in range(ROUNDS):
        progress, _ = one_round(plan, simulation, states, progress, index, Quiet())
    rnd = Round(ROUNDS, 0)
    views = {client.id: simulation.view(client, method.send(progress.server, client, rnd), rnd) for client in clients}
    return Game(trainer, views, states, loaded)


def trainer_of(adapted: AdaptedModel, examples: Examples, clients: Sequence[ClientInfo]) -> LocalTrainer:
    """Two clients in a step; each has three examples held out, and the rest are the test set."""
    rows = dict(zip([client.id for client in clients], torch.arange(sum(SIZES)).split(SIZES), strict=True))
    rest = torch.arange(sum(SIZES), len(examples)).split(3)
    held_out = {client.id: rest[i] for i, client in enumerate(clients)}
    return LocalTrainer(adapted, TASK, examples, rows, held_out, examples, SETTINGS, eval_batch_size=16, clients_per_step=2)


@every_row
def test_training_and_evaluation_see_the_products_added_to_the_weights(row, ranks, games):
    checked = games(row, ranks).trainer.checked
    assert sum(one.what.startswith("Round") for one in checked) >= ROUNDS * len(SIZES)
    for one in checked:
        assert_close(
            one.found, one.expected, rtol=1e-6, atol=1e-6, check_dtype=False, msg=lambda m, w=one.what: f"{w}: {m}"
        )


@every_row
def test_only_what_a_request_names_moves(row, ranks, games):
    for request, trained in games(row, ranks).trainer.fits:
        before, after = pack(request.start), pack(trained)
        assert before.keys() == after.keys()
        frozen = {key for key in before if key.rpartition(".")[2] not in request.train}
        assert all(torch.equal(after[key], before[key]) for key in frozen)
        for key, moves in (request.mask or {}).items():
            assert torch.equal(after[key].where(moves, before[key]), after[key]), key
        assert any(not torch.equal(after[key], before[key]) for key in before.keys() - frozen)


@every_row
def test_a_view_gives_the_logits_of_its_products_added_to_the_weights(row, ranks, games):
    game = games(row, ranks)
    bare = PlainModel(game.loaded.model)
    for client, view in game.views.items():
        found, inputs = logits_of(game, view)
        assert_close(found, game.trainer.plain.logits(inputs, view).detach(), rtol=1e-6, atol=1e-6)
        head = {name: part for name, part in view.items() if isinstance(part, Dense)}
        assert (found - bare.logits(inputs, head)).abs().max() > 1e-3, f"the adapter of client {client} does nothing"


def logits_of(game: Game, view: Adapter) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the test set by the view in the layers that train it; and the inputs."""
    local = game.trainer.inner
    inputs, _ = local.test.batch(torch.arange(len(local.test)), torch.device("cpu"))
    local.adapted.load_clients([view])
    with torch.no_grad():
        return local.adapted.model.eval()(**inputs).logits, inputs


@every_row
@pytest.mark.slow
def test_exported_weights_give_the_logits_of_the_view(row, ranks, games, tmp_path):
    """In PEFT, and in plain transformers."""
    import peft
    import transformers

    game = games(row, ranks)
    local, base_updates = game.trainer.inner, list(game.states.base_updates.values())
    for client, view in game.views.items():
        if unfit(view):
            continue
        adapter = with_base_updates(view, base_updates)
        expected, inputs = logits_of(game, view)
        source, tokenizer = game.loaded.source, game.loaded.tokenizer
        to_peft(adapter, tmp_path / client, 0.0, source, local.adapted, LABELS, tokenizer, TASK.peft_type)
        plain, _, _ = TASK.load(game.loaded.source, LABELS, seed=1)  # the head has to come out of the folder
        in_peft = peft.PeftModel.from_pretrained(plain.double(), tmp_path / client).eval()
        untouched, _, _ = TASK.load(game.loaded.source, LABELS, seed=1)
        to_merged(adapter, tmp_path / f"merged {client}", untouched.double(), tokenizer, torch.float64)
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / f"merged {client}", dtype=torch.float64
        ).eval()
        with torch.no_grad():
            assert_close(in_peft(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
            assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_rows_together_ask_for_all_that_can_be_asked(games):
    """So that the laws above are about all of it."""
    played = [games(row, ranks) for row, ranks in [*CASES.values(), *DORA.values(), *MIXED.values()]]
    fits = [request for game in played for request, _ in game.trainer.fits]
    for name in ("epochs", "frozen_extra", "penalties", "mask", "rates"):
        assert any(getattr(request, name) for request in fits), name
    assert any(not moves.all() for request in fits for moves in (request.mask or {}).values())
    kinds = {type(part) for request in fits for part in request.start.values()}
    assert kinds == set(get_args(Factors))
    assert {factor for request in fits for factor in request.train} == {*"abcgmsw", "delta"}
    assert any(game.trainer.gradients for game in played) and any(game.states.base_updates for game in played)
    assert any(one.what.endswith("features") for game in played for one in game.trainer.checked)
