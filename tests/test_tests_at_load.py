"""The tests of a model at load: when their results come from the cache, and that a run is then the same."""

import json
from importlib.metadata import version

import pytest
import torch

from fedlora import tests_at_load
from fedlora.api import run
from fedlora.config.experiment import Experiment, build
from fedlora.errors import UserError
from fedlora.loaded_model import LoadedModel
from fedlora.models.adapted import AdaptedModel
from fedlora.tasks.table import task_of

from architectures import model_of, tokenizer_of
from tiny import LABELS, tiny_bert
from wired import assert_same_runs, furnish, problem


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tested(folder, monkeypatch):
    """The models that were tested, one entry for each test."""
    made = []
    for name in ("try_packing", "safe_clients_per_step"):
        test = getattr(tests_at_load, name)
        monkeypatch.setattr(tests_at_load, name, lambda *of, name=name, test=test: made.append(name) or test(*of))
    return made


@pytest.fixture
def faked(folder, monkeypatch):
    """As `tested`, of tests that take no time."""
    made = []
    monkeypatch.setattr(tests_at_load, "try_packing", lambda *of: made.append("try_packing"))
    monkeypatch.setattr(tests_at_load, "safe_clients_per_step", lambda *of: made.append("safe_clients_per_step") or 1)
    return made


def settings(home, *overrides: str) -> Experiment:
    table = {"model": str(home / "bert"), "data": "rows.jsonl", "method": {"name": "fedit", "rank": 2}}
    return build({**table, "train": {"device": "cpu", "max_length": 16}}, overrides)


def load(experiment: Experiment, labels=LABELS) -> LoadedModel:
    return LoadedModel.load(task_of(dict(experiment.task)), experiment, labels)


def verdicts(loaded: LoadedModel) -> tuple[bool, bool, int, bool]:
    packing = loaded.adapted.packing
    return packing.works, packing.narrows, loaded.clients_per_step, loaded.one_at_a_time


def test_a_second_load_tests_nothing_and_has_the_same_results(tmp_path, tested):
    tiny_bert(tmp_path / "bert")
    first = verdicts(load(settings(tmp_path)))
    assert tested == ["try_packing", "safe_clients_per_step"] and first[:2] == (True, True)
    assert verdicts(load(settings(tmp_path))) == first and len(tested) == 2


def test_runs_with_and_without_results_in_the_cache_are_the_same_bit_for_bit(tmp_path, tested):
    home = furnish(tmp_path)
    train = {"batch_size": 8, "max_length": 16, "lr": 1e-2, "device": "cpu", "clients_per_step": 4}
    table = problem(home, rounds=2, train=train)
    for name in ("one", "other"):
        run(build(table), tmp_path / name)
    assert len(tested) == 2
    assert_same_runs(tmp_path / "one", tmp_path / "other")
    environments = [json.loads((tmp_path / name / "environment.json").read_text()) for name in ("one", "other")]
    assert environments[0] == environments[1] and environments[0]["packed"]


OTHER_SETTINGS = (
    "lora.targets=['query']",
    "train.max_length=17",
    "train.clients_per_step=3",
    "train.precision='bf16'",
    "train.gradient_checkpointing=true",
    "method.norms=true",
    "seed=1",
)


def test_other_settings_and_labels_are_tested_but_those_of_the_optimizer_are_not(tmp_path, faked):
    tiny_bert(tmp_path / "bert")
    load(settings(tmp_path))
    load(settings(tmp_path, "train.lr=0.1", "rounds=99", "method.rank=3", "train.batch_size=2"))
    assert len(faked) == 2
    for override in OTHER_SETTINGS:
        faked.clear()
        load(settings(tmp_path, override))
        assert len(faked) == 2, override
    load(settings(tmp_path), ["a", "b"])
    assert len(faked) == 4


def other_weights(home, _):
    tiny_bert(home / "bert", seed=1)


def other_config(home, _):
    file = home / "bert" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "relu"}))


def other_code(_, patch):
    patch.setattr(tests_at_load, "_own_code", lambda: "edited")


def other_package(home, patch):
    (home / "packages" / f"torch-{version('torch')}.1.dist-info").mkdir(parents=True)
    patch.syspath_prepend(home / "packages")


def other_threads(_, patch):
    report = torch.__config__.parallel_info()
    patch.setattr(torch.__config__, "parallel_info", lambda: report + "one more thread")


def other_instructions(_, patch):
    report = torch.__config__.show()
    patch.setattr(torch.__config__, "show", lambda: report.replace("CPU capability", "no CPU capability"))


def other_attention(_, patch):
    wrap = AdaptedModel.__init__

    def eager(adapted, model, *more):
        model.set_attn_implementation("eager")
        wrap(adapted, model, *more)

    patch.setattr(AdaptedModel, "__init__", eager)


@pytest.mark.parametrize(
    "change",
    [other_weights, other_config, other_code, other_package, other_threads, other_instructions, other_attention],
)
def test_another_model_or_environment_is_tested(tmp_path, faked, monkeypatch, change):
    tiny_bert(tmp_path / "bert")
    load(settings(tmp_path))
    change(tmp_path, monkeypatch)
    load(settings(tmp_path))
    assert len(faked) == 4


def test_the_number_of_threads_is_part_of_the_report_of_torch():
    before, threads = torch.__config__.parallel_info(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.__config__.parallel_info() != before
    finally:
        torch.set_num_threads(threads)


def test_the_digest_of_the_package_is_that_of_its_source_files(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(tests_at_load, "__file__", str(tmp_path / "tests_at_load.py"))
    digests = [tests_at_load._own_code()]
    for name, text in (("train/a.py", "x = 1"), ("train/a.py", "x = 2"), ("b.py", "")):
        (tmp_path / name).write_text(text)
        digests.append(tests_at_load._own_code())
    assert len(set(digests)) == 4 and tests_at_load._own_code() == digests[-1]


@pytest.mark.parametrize("damage", ["cut", "of another key", "unreadable"])
def test_a_damaged_result_is_not_used(tmp_path, folder, faked, damage):
    tiny_bert(tmp_path / "bert")
    load(settings(tmp_path))
    (file,) = folder.glob("tests at load-*")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "of another key":
        load(settings(tmp_path, "seed=1"))
        (other,) = set(folder.glob("tests at load-*")) - {file}
        file.write_bytes(other.read_bytes())
    else:
        file.unlink()
        file.mkdir()
    faked.clear()
    load(settings(tmp_path))
    assert len(faked) == 2


def test_without_a_cache_each_load_is_tested_and_no_key_is_computed(tmp_path, faked, monkeypatch):
    tiny_bert(tmp_path / "bert")
    monkeypatch.setenv("FEDLORA_CACHE", "")
    monkeypatch.setattr(tests_at_load, "fingerprint", lambda _: pytest.fail("the model's files are read"))
    for _ in range(2):
        load(settings(tmp_path))
    assert len(faked) == 4


def test_that_clients_are_trained_one_at_a_time_is_remembered(tmp_path, tested):
    home = tmp_path / "bert"
    model_of("deberta-v2").base_model.save_pretrained(home)
    tokenizer_of("deberta-v2").save_pretrained(home)
    first, second = (verdicts(load(settings(tmp_path))) for _ in range(2))
    assert len(tested) == 2
    assert first == second and first[2:] == (1, True)


@pytest.mark.parametrize(
    "place",
    [
        "fedlora.tasks.classification.Classification.features",  # the padded form
        "fedlora.models.packing._attention",  # the packed form
        "fedlora.train.independence._max_difference",  # clients in one step
    ],
)
def test_a_test_that_runs_out_of_memory_has_no_result(tmp_path, folder, monkeypatch, place):
    tiny_bert(tmp_path / "bert")

    def exhausted(*_):
        raise torch.OutOfMemoryError("the GPU is full")

    monkeypatch.setattr(place, exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        load(settings(tmp_path))
    assert not list(folder.glob("tests at load-*"))


def test_a_model_that_cannot_be_trained_has_no_result(tmp_path, folder, monkeypatch):
    tiny_bert(tmp_path / "bert")

    def fail(*_):
        raise ValueError("no backward pass")

    monkeypatch.setattr("fedlora.train.independence.train_together", fail)
    for _ in range(2):
        with pytest.raises(UserError, match="cannot be trained"):
            load(settings(tmp_path))
    assert not list(folder.glob("tests at load-*"))
