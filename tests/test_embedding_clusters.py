"""The partition by clusters of embeddings: for every task, against a plain loop, cached, and what is rejected."""

import json

import pytest
import torch
import transformers

import fedlora.embedding_clusters
from fedlora.config.experiment import build
from fedlora.config.sections import Clients
from fedlora.data.partition import divide
from fedlora.embedding_clusters import embedding_clusters
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.linalg.kmeans import kmeans
from fedlora.loaded_model import LoadedModel
from fedlora.randomness import derive
from fedlora.session import Session
from fedlora.tasks.table import tasks
from tiny_lm import tiny_lm
from tiny_tasks import tiny_task

from tiny import WORDS, tiny_bert, tiny_rows

CLIENTS = {"count": 3, "partition": "clusters", "clusters": 4, "alpha": 0.3}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))


def settings(home, **clients):
    home.mkdir(exist_ok=True)
    return build(
        {
            "model": str(tiny_bert(home / "bert")),
            "data": {"source": str(tiny_rows(home / "rows.jsonl", 60))},
            "clients": {**CLIENTS, **clients},
            "train": {"device": "cpu"},
        }
    )


@pytest.mark.parametrize("kind", tasks())
def test_examples_of_every_task_are_divided_as_by_a_dirichlet_partition_of_their_clusters(kind, tmp_path):
    given = build({**tiny_task(kind, tmp_path / kind), "clients": CLIENTS, "train": {"device": "cpu"}})
    found = FederatedData.make(given)
    clusters = embedding_clusters(given, found.labelled_data)
    assert set(clusters) == {0, 1, 2, 3}
    by_class = Clients(count=3, partition="dirichlet", alpha=0.3)
    assert found.partition == divide(found.labelled_data.train, clusters, by_class, given.seed)


def test_clusters_are_those_of_the_features_of_one_text_after_another(tmp_path, own_cache):
    given = settings(tmp_path)
    data = FederatedData.make(given)
    model = transformers.AutoModel.from_pretrained(given.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    with torch.no_grad():
        each = [model(**tokenizer(text, return_tensors="pt"))[0][0, 0] for text in data.labelled_data.train["text"]]
    expected = kmeans(torch.stack(each).double(), 4, derive(given.seed, "clusters")).tolist()
    assert embedding_clusters(given, data.labelled_data) == expected


def test_the_table_of_clients_counts_labels_and_not_clusters(tmp_path):
    found = FederatedData.make(settings(tmp_path))
    assert found.keys == found.labelled_data.train["label"][:]


def test_embeddings_are_computed_once_and_depend_on_neither_precision_nor_packing(tmp_path, own_cache, monkeypatch):
    given = settings(tmp_path)
    before = FederatedData.make(given).partition

    def load(*_):
        raise AssertionError("the model is loaded again")

    train = given.train.model_copy(update={"precision": "bf16", "packed": False})
    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "load", load)
        assert FederatedData.make(given.model_copy(update={"train": train})).partition == before
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "another"))  # as a node of a deployment has it
    assert FederatedData.make(given.model_copy(update={"train": train})).partition == before


def test_a_run_trains_on_the_examples_of_its_clusters(tmp_path):
    given = settings(tmp_path)
    session = Session.make(given, FederatedData.make(given))
    sizes = sorted(client.examples for client in session.clients)
    assert sum(sizes) + sum(len(share.held_out) for share in session.federated_data.partition.shares) == 54


def test_a_text_longer_than_the_maximum_length_is_embedded_by_its_beginning(tmp_path, own_cache):
    model, clusters = tiny_lm(tmp_path / "lm"), []
    for name, ending in (("short", 0), ("long", 90)):  # the model has 64 positions
        texts = [" ".join(WORDS[(7 * i + j) % 90] for j in range(31 + ending)) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        given = build(
            {
                "model": str(model),
                "task": "causal-lm",
                "data": str(tmp_path / f"{name}.jsonl"),
                "clients": {**CLIENTS, "count": 2},
                "train": {"device": "cpu", "max_length": 31},
            }
        )
        clusters.append(embedding_clusters(given, FederatedData.make(given).labelled_data))
    assert clusters[0] == clusters[1]


def test_more_clusters_than_examples_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"^clients.clusters = 55: the training set has 54 examples; lower it$"):
        FederatedData.make(settings(tmp_path, clusters=55))


def test_one_cluster_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"clients.clusters = 1: expected a whole number of at least 2"):
        settings(tmp_path, clusters=1)


def test_examples_that_are_longer_than_the_model_s_positions_are_rejected(tmp_path):
    given = settings(tmp_path)
    texts = [" ".join(WORDS[:70])] * 60
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": x, "label": i % 3}) for i, x in enumerate(texts)))
    with pytest.raises(
        UserError, match=r"train.max_length = 128: 54 of 54 examples are longer than the model's 64 positions"
    ):
        FederatedData.make(given)


def test_features_that_are_not_finite_are_rejected(tmp_path, own_cache, monkeypatch):
    def features(adapted, *rest):
        found = real(adapted, *rest)
        found[:2] = torch.nan
        return found

    real = fedlora.embedding_clusters.features
    monkeypatch.setattr(fedlora.embedding_clusters, "features", features)
    with pytest.raises(UserError, match=r"features of 2 of 54 training examples are not finite"):
        FederatedData.make(settings(tmp_path))
