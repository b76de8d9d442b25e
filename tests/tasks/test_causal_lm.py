"""Training, evaluation and export of a language model, against PEFT and transformers."""

import math

import peft
import pytest
import torch
import transformers
from torch.testing import assert_close

from fedlora.adapter import lora_init, pack
from fedlora.api import export, resume, run
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.exporting.write import to_peft
from fedlora.federated_data import FederatedData
from fedlora.messages import ClientInfo, Fit, FitRequest, Gradient, Round, Statistics
from fedlora.parts.dense import Dense
from fedlora.parts.weight_change import WeightChange
from fedlora.session import Session, check
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.task import NO_TARGET, Task
from fedlora.train.job import Job
from tiny_lm import CHATML, CONFIGS, pair_rows, tiny_lm

from tiny import tiny_bert
from wired import assert_same_runs

TASK: Task = CausalLM()
PAIR = {"prompt": "prompt", "response": "response"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for kind in CONFIGS:
        tiny_lm(home / kind, kind, CHATML)
    pair_rows(home / "rows.jsonl", 30)
    pair_rows(home / "test.jsonl", 7)
    return home


def experiment(home, kind="llama", columns=PAIR, method="fedit", clients=3, **train):
    return build(
        {
            "model": str(home / kind),
            "task": "causal-lm",
            "data": {"source": str(home / "rows.jsonl"), "test": str(home / "test.jsonl"), **columns},
            "rounds": 2,
            "clients": {"count": clients, "partition": "iid"},
            "method": {"name": method, "rank": 2},
            "train": {"batch_size": 4, "lr": 1e-2, "max_length": 14, "device": "cpu", **train},
        }
    )


def session_of(chosen):
    return Session.make(chosen, FederatedData.make(chosen))


def fit(session):
    """Each client's result of training from the same start, and the loss of the model before."""
    start = lora_init(session.adapted.spec, 2, 0)
    asked = [FitRequest(Fit(start, frozenset("ba")), client, 0) for client in session.clients]
    trained = session.trainer.fit(asked, Round(0, 0))
    return trained, session.trainer.evaluate(start)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [PAIR, {"messages": "messages"}, {}], ids=["pair", "messages", "text"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_clients_train_the_same_together_packed_padded_and_one_at_a_time(home, kind, columns):
    packed = session_of(experiment(home, kind, columns))
    assert packed.adapted.packing.works and packed.trainer.clients_per_step == 16
    expected, before = fit(packed)
    for settings in ({"packed": False}, {"clients_per_step": 1}, {"packed": False, "clients_per_step": 1}):
        session = session_of(experiment(home, kind, columns, batches="random", **settings))
        assert session.adapted.packing.works is settings.get("packed", True)
        found, evaluated = fit(session)
        assert evaluated == pytest.approx(before, rel=1e-5)
        for one, other in zip(found, expected, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.steps == other.steps
            assert_close(pack(one.adapter), pack(other.adapter), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("columns", [PAIR, {"messages": "messages"}], ids=["pair", "messages"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_client_trains_as_a_plain_loop_with_peft_and_transformers_own_loss(home, tmp_path, kind, columns):
    session = session_of(experiment(home, kind, columns, clients=1))
    settings, examples, spec = session.experiment.train, session.trainer.examples, session.adapted.spec
    start = lora_init(spec, 2, 0)
    to_peft(start, tmp_path, 0.0, str(home / kind), session.adapted, (), session.tokenizer, TASK.peft_type)
    request = FitRequest(Fit(start, frozenset("ba"), epochs=2), session.clients[0], 0)
    trained = session.trainer.fit([request], Round(0, 0))[0]

    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr, weight_decay=0.0)
    job: Job = session.trainer._job(request, Round(0, 0))
    batches, last = job.batches(examples.lengths(), settings), []
    for step in range(trained.steps):
        inputs, targets = examples.batch(next(batches), torch.device("cpu"))
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, 1:] = inputs["input_ids"][:, 1:].where(targets[:, :-1] != NO_TARGET, -100)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= trained.steps // 2:
            last.append((float(loss.detach()), int((targets != NO_TARGET).sum())))
    assert trained.loss == pytest.approx(sum(x * n for x, n in last) / sum(n for _, n in last), rel=1e-5)
    own = peft.get_peft_model_state_dict(model)
    for name, part in trained.adapter.items():
        assert_close(part.a, own[f"base_model.model.{name}.lora_A.weight"], rtol=1e-3, atol=1e-5)
        scaled = own[f"base_model.model.{name}.lora_B.weight"] * spec.scale(name, 2)
        assert_close(part.b, scaled, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_full_fine_tuning_of_the_whole_model_is_a_plain_loop_over_all_its_parameters(home, kind):
    table = experiment(home, kind, clients=1).model_dump(exclude_none=True)
    session = session_of(build({**table, "method": {"name": "full-ft", "scope": "all"}}))
    examples, (rows,) = session.trainer.examples, session.trainer.rows.values()
    start = {name: Dense(w) for name, w in session.adapted.spec.head.items()}
    start |= {name: WeightChange(torch.zeros(*size)) for name, size in session.adapted.spec.modules.items()}
    gradient = session.trainer.gradient(session.clients[0], Gradient(start, frozenset({"w", "delta"})))
    model = transformers.AutoModelForCausalLM.from_pretrained(home / kind)
    inputs, targets = examples.batch(rows, torch.device("cpu"))
    model(**inputs, labels=targets.roll(1, 1)).loss.backward()
    for name, part in gradient.items():
        found = part.w if isinstance(part, Dense) else part.delta
        expected = model.get_parameter(name if isinstance(part, Dense) else f"{name}.weight").grad
        expected = expected.mT if expected.shape != found.shape else expected
        assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert any("embed" in name or "wte" in name for name in gradient)


def test_the_metrics_are_those_of_transformers_own_loss_over_all_targets(home):
    session = session_of(experiment(home))
    found = session.trainer.evaluate(lora_init(session.adapted.spec, 2, 0))
    model, test = transformers.AutoModelForCausalLM.from_pretrained(home / "llama"), session.trainer.test
    inputs, targets = test.batch(torch.arange(len(test)), torch.device("cpu"))
    labels = targets.roll(1, 1)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    real = targets != NO_TARGET
    right = (output.logits.argmax(-1) == targets)[real].float().mean()
    assert found == pytest.approx(
        {
            "loss": float(output.loss),
            "perplexity": math.exp(float(output.loss)),
            "token_accuracy": float(right),
            "examples": 7,
        },
        rel=1e-5,
    )
    assert next(iter(found)) == "loss" and {"loss", "perplexity"} == TASK.lower_is_better


def test_statistics_of_a_shared_pass_add_up_and_have_the_names_and_types_of_those_of_no_examples(home):
    session = session_of(experiment(home))
    examples, model = session.trainer.examples, session.adapted.model.eval()
    session.adapted.load_clients([])
    inputs, targets = examples.batch(torch.arange(6), torch.device("cpu"))
    real = torch.tensor([[True, True, True], [True, False, False]])
    with torch.inference_mode():
        together = TASK.measure(model, inputs, targets, real)
        each = TASK.measure(model, inputs, targets, torch.ones(6, 1, dtype=torch.bool))
    for name, x in together.items():
        assert_close(x, torch.stack([each[name][:3].sum(), each[name][3]]))
    empty = TASK.no_statistics(())
    assert {name: x[0].dtype for name, x in together.items()} == {name: x.dtype for name, x in empty.items()}
    assert not any(x.any() for x in empty.values()) and math.isnan(TASK.metrics(Statistics(0, empty))["loss"])


def test_impossible_statistics_are_rejected():
    def stated(examples, loss, tokens, right):
        sums = {"loss": torch.tensor(loss).double(), "tokens": torch.tensor(tokens), "right": torch.tensor(right)}
        return TASK.check(Statistics(examples, sums))

    assert stated(3, 7.0, 5, 5) is None
    assert "fewer" in stated(6, 7.0, 5, 5) and "fewer" in stated(3, 7.0, 5, 6) and "negative" in stated(3, -1.0, 5, 5)


def test_an_overflow_of_the_perplexity_is_infinite():
    sums = {"loss": torch.tensor(1e6).double(), "tokens": torch.tensor(1), "right": torch.tensor(0)}
    assert TASK.metrics(Statistics(1, sums))["perplexity"] == math.inf


def test_a_resumed_run_is_the_uninterrupted_one(home, tmp_path):
    chosen = experiment(home, columns={"messages": "messages"})
    run(chosen, tmp_path / "whole")
    run(chosen.model_copy(update={"rounds": 1}), tmp_path / "parts")
    resume(tmp_path / "parts", overrides=["rounds=2"])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exported_adapter_and_a_merged_model_give_the_loss_of_the_run(home, tmp_path, kind):
    result = run(experiment(home, kind, columns={"messages": "messages"}), tmp_path / "run")
    export(tmp_path / "run", "merged", tmp_path / "merged")
    code = (tmp_path / "run/adapter/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    space: dict = {}
    exec(code.replace("Path()", f"Path({str(tmp_path / 'run/adapter')!r})"), space)
    session = session_of(experiment(home, kind, columns={"messages": "messages"}))
    test = session.trainer.test
    inputs, targets = test.batch(torch.arange(len(test)), torch.device("cpu"))
    for model in (space["model"], transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        with torch.no_grad():
            loss = model.eval()(**inputs, labels=targets.roll(1, 1)).loss
        assert float(loss) == pytest.approx(result.rows[-1].global_["loss"], rel=1e-4)
    chat = [{"role": "user", "content": "bab"}]
    ids = transformers.AutoTokenizer.from_pretrained(home / kind).apply_chat_template(chat, return_dict=True)["input_ids"]
    assert space["tokenizer"].apply_chat_template(chat, return_dict=True)["input_ids"] == ids and 2 in ids


def test_the_output_layer_is_no_head_and_a_target_only_if_named(home):
    session = session_of(experiment(home))
    assert not session.adapted.spec.head and session.adapted.layers.keys() == {
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")
    }
    for targets, named in (("all-linear", False), (["q_proj", "lm_head"], True)):
        chosen = build({**experiment(home).model_dump(exclude_none=True), "lora": {"targets": targets}})
        assert ("lm_head" in session_of(chosen).adapted.layers) == named


def test_a_model_that_reads_the_tokens_to_be_predicted_is_rejected(tmp_path):
    bert = tiny_bert(tmp_path)
    with pytest.raises(UserError, match="'bert' model is not causal"):
        TASK.outline(str(bert), ())


def test_partitions_by_label_and_methods_that_need_labels_are_rejected(home):
    chosen = experiment(home)
    by_label = build({**chosen.model_dump(exclude_none=True), "clients": {"count": 3, "partition": "dirichlet"}})
    with pytest.raises(UserError, match="divides by classes"):
        FederatedData.make(by_label)
    with pytest.raises(UserError, match="needs labelled examples"):
        FederatedData.make(experiment(home, method="ce-lora"))


@pytest.mark.parametrize(
    ("clients", "names"),
    [({"partition": "natural"}, {"u0", "u1", "u2", "u3"}), ({"partition": "length", "count": 2}, {"000", "001"})],
)
def test_texts_are_partitioned_by_user_and_by_length(home, clients, names):
    table = experiment(home, columns={"messages": "messages", "user": "user"}).model_dump(exclude_none=True)
    chosen = build({**table, "clients": clients})
    check(chosen, FederatedData.make(chosen))
    assert {client.id for client in session_of(chosen).clients} == names


def test_the_numbers_of_examples_of_plain_texts_are_those_of_their_blocks(home):
    session = session_of(experiment(home, columns={}))
    for client in session.clients:
        assert client.examples == len(session.trainer.rows[client.id]) < 9
    assert {*session.trainer.examples.lengths().tolist()} >= {14}


def test_a_client_without_a_target_stops_the_run(home, tmp_path):
    with pytest.raises(UserError, match="has a target"):
        session_of(experiment(home, max_length=1))


def test_the_loss_of_an_example_depends_on_no_other_example(home):
    session = session_of(experiment(home))
    examples, model = session.trainer.examples, session.adapted.model.eval()
    session.adapted.load_clients([])
    for rows in (torch.arange(5), torch.tensor([0, 9, 9, 9, 4])):
        sums, counts = TASK.losses(model, *examples.batch(rows, torch.device("cpu")))
        single = [TASK.losses(model, *examples.batch(row[None], torch.device("cpu"))) for row in rows]
        assert_close(sums, torch.cat([x for x, _ in single]), rtol=1e-5, atol=1e-5)
        assert counts.tolist() == [int(n) for _, n in single]


def test_a_client_of_a_deployment_reads_its_own_file(home):
    chosen = experiment(home, columns={"messages": "messages"})
    data = FederatedData.of_client(chosen, "x", str(home / "test.jsonl"), 2, ())
    session = Session.make(chosen, data)
    assert session.clients == [ClientInfo("x", 2, 6)] and len(session.trainer.held_out["x"]) == 1
