from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner

from fedlora.config.sections import Clients
from fedlora.data import partition as partitions
from fedlora.errors import UserError

LABELS = 10
NUMBERED = ["iid", "dirichlet", "pathological", "shards", "length"]


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", "")


def corpus(rows=600, users=20):
    rng = np.random.default_rng(0)
    label, user = rng.integers(0, LABELS, rows), rng.integers(0, users, rows)
    return Dataset.from_dict({"text": ["x"] * rows, "label": label.tolist(), "user": [f"u{i}" for i in user]})


def divide(train, clients, seed):
    return partitions.divide(train, train["label"][:], clients, seed)


def label_table(train, partition, labels):
    return partitions.label_table(train["label"][:], partition, labels)


def rows_of(share):
    return sorted([*share.train, *share.held_out])


def of_users(users, **clients):
    train = Dataset.from_dict({"text": ["x"] * len(users), "label": [0] * len(users), "user": list(users)})
    return divide(train, Clients(partition="natural", **clients), seed=0)


@pytest.mark.parametrize("partition", [*NUMBERED, "natural"])
def test_the_seed_and_nothing_else_decides(partition):
    clients = Clients(count=8, partition=partition)
    np.random.seed(1)
    first = divide(corpus(), clients, seed=5)
    np.random.seed(2)
    assert divide(corpus(), clients, seed=5) == first
    assert divide(corpus(), clients, seed=6) != first


@pytest.mark.parametrize("partition", ["dirichlet", "pathological", "shards"])
def test_the_same_rows_are_divided_by_flwr_datasets_only_once(partition, tmp_path, monkeypatch):
    train, clients = corpus(601), Clients(count=8, partition=partition)
    expected = divide(train, clients, seed=5)
    others = [(corpus(600), clients, 5), (train, clients.model_copy(update={"count": 7}), 5), (train, clients, 6)]
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    assert divide(train, clients, seed=5) == expected
    with monkeypatch.context() as patch:
        patch.setattr(partitions, "_parts", lambda *_: pytest.fail("divided again"))
        assert divide(train, clients, seed=5) == expected
    for other in others:
        assert divide(*other) != expected
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("partition", [*NUMBERED, "natural"])
def test_no_row_has_two_owners_and_those_without_are_counted(partition):
    division = divide(corpus(601), Clients(count=8, partition=partition), seed=0)
    given = [row for share in division.shares for row in rows_of(share)]
    assert len(set(given)) == len(given)
    assert len(given) + division.left_out_rows == 601


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "length"])
def test_iid_dirichlet_and_length_give_every_row_to_somebody(partition):
    assert divide(corpus(601), Clients(count=8, partition=partition), seed=0).left_out_rows == 0


def test_iid_gives_everybody_as_much_as_flower_does():
    division = divide(corpus(607), Clients(count=8, partition="iid"), seed=0)
    partitioner = IidPartitioner(8)
    partitioner.dataset = corpus(607)
    assert [len(rows_of(share)) for share in division.shares] == [len(partitioner.load_partition(i)) for i in range(8)]


def test_labels_are_the_more_skewed_the_smaller_alpha_is():
    def largest_label_share(alpha):
        train = corpus(3000)
        division = divide(train, Clients(count=10, alpha=alpha, min_size=1), seed=0)
        table = label_table(train, division, LABELS)
        return (table.max(axis=1) / table.sum(axis=1)).mean()

    shares = [largest_label_share(alpha) for alpha in (100.0, 1.0, 0.1)]
    assert shares == sorted(shares)
    assert shares[2] > 2 * shares[0]


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_pathological_clients_have_so_many_labels_and_every_label_an_owner(classes):
    train = corpus()
    division = divide(train, Clients(count=12, partition="pathological", classes=classes), seed=0)
    table = label_table(train, division, LABELS)
    assert ((table > 0).sum(axis=1) == classes).all()
    assert (table.sum(axis=0) > 0).all()


def test_shards_are_of_one_size_and_a_remainder_is_left_out():
    division = divide(corpus(605), Clients(count=10, partition="shards", shards=3), seed=0)
    assert {len(rows_of(share)) for share in division.shares} == {60}
    assert division.left_out_rows == 5


def test_natural_clients_are_the_users():
    train = corpus()
    division = divide(train, Clients(count=None, partition="natural"), seed=0)
    assert [share.client for share in division.shares] == sorted(train.unique("user"))
    for share in division.shares:
        assert rows_of(share) == [row for row, user in enumerate(train["user"]) if user == share.client]


def test_natural_leaves_out_users_with_too_few_examples():
    division = of_users("aaabccdd", count=None, min_size=2)
    assert [share.client for share in division.shares] == ["a", "c", "d"]
    assert (division.left_out_rows, division.left_out_clients) == (1, 1)


def test_natural_with_a_count_takes_the_largest_users_then_the_first_by_name():
    division = of_users("ccbbaddddd", count=2, min_size=1)
    assert [share.client for share in division.shares] == ["b", "d"]
    assert (division.left_out_rows, division.left_out_clients) == (3, 2)


@pytest.mark.parametrize(("rows", "part", "expected"), [(1, 0.1, 0), (2, 0.1, 1), (2, 0.9, 1), (20, 0.1, 2), (20, 0.0, 0)])
def test_the_held_out_part_is_as_asked_but_neither_nothing_nor_all(rows, part, expected):
    (share,) = of_users("a" * rows, count=None, min_size=1, held_out=part).shares
    assert (len(share.held_out), len(share.train)) == (expected, rows - expected)


def test_what_a_client_holds_out_does_not_depend_on_the_others():
    alone, together = of_users("aaaaaaaa", count=None), of_users("aaaaaaaabbb", count=None)
    assert together.shares[0] == alone.shares[0]


def test_names_of_numbered_clients_sort_as_their_numbers_do():
    names = [
        share.client for share in divide(corpus(1100), Clients(count=1001, partition="iid", min_size=1), seed=0).shares
    ]
    assert names == [f"{i:04}" for i in range(1001)]


def test_the_label_table_counts_every_given_row():
    train = corpus()
    division = divide(train, Clients(count=4), seed=0)
    table = label_table(train, division, LABELS)
    assert table.sum(axis=1).tolist() == [len(rows_of(share)) for share in division.shares]
    assert table.sum(axis=0).tolist() == np.bincount(train["label"][:], minlength=LABELS).tolist()


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        ({"count": 601, "min_size": 1}, ["clients.count = 601", "found 600"]),
        ({"count": 100, "min_size": 7, "partition": "iid"}, ["clients.min_size = 7", "requires 700"]),
        ({"count": 60, "min_size": 9, "alpha": 0.01}, ["clients.alpha = 0.01", "clients.min_size = 9"]),
        ({"partition": "pathological", "classes": 11}, ["clients.classes = 11", "10 labels"]),
        ({"partition": "pathological", "classes": 10, "count": 300}, ["clients.classes = 10", "'pathological'"]),
        ({"partition": "pathological", "classes": 1, "count": 280}, ["clients.min_size = 2", "'pathological'"]),
        ({"partition": "shards", "shards": 61}, ["clients.shards = 61", "610 shards of 600 examples"]),
        ({"partition": "natural", "count": 21}, ["clients.count = 21", "20 of 20 users"]),
        ({"partition": "natural", "count": None, "min_size": 500}, ["clients.min_size = 500", "0 of 20 users"]),
    ],
)
def test_an_impossible_division_is_refused_in_one_line_that_names_the_key(clients, words):
    with pytest.raises(UserError) as rejection_reason:
        divide(corpus(), Clients(**clients), seed=0)
    assert all(word in str(rejection_reason.value) for word in words)
    assert "\n" not in str(rejection_reason.value)


def test_natural_without_owners_is_refused():
    with pytest.raises(UserError, match=r"data\.user"):
        divide(corpus().remove_columns("user"), Clients(partition="natural"), seed=0)


def of_tasks(users, tasks, **clients):
    train = Dataset.from_dict({"label": [0] * len(users), "user": list(users), "task": list(tasks)})
    return divide(train, Clients(partition="natural", count=None, **clients), seed=0)


def test_a_clients_tasks_are_shares_of_their_own():
    division = of_tasks("aaaabbbb", "xxyyyyyy")
    assert [(s.client, s.task, rows_of(s)) for s in division.shares] == [
        ("a/x", "x", [0, 1]),
        ("a/y", "y", [2, 3]),
        ("b/y", "y", [4, 5, 6, 7]),
    ]
    assert (division.left_out_rows, division.left_out_clients) == (0, 0)


@pytest.mark.parametrize("partition", NUMBERED)
def test_tasks_do_not_change_who_owns_a_row(partition):
    plain = corpus(601)
    tasks = plain.add_column("task", [f"t{i % 3}" for i in range(601)])
    owner = {
        row: s.client for s in divide(plain, Clients(count=8, partition=partition), seed=0).shares for row in rows_of(s)
    }
    for share in divide(tasks, Clients(count=8, partition=partition), seed=0).shares:
        assert {(f"{owner[row]}/t{row % 3}", f"t{row % 3}") for row in rows_of(share)} == {(share.client, share.task)}


def test_tasks_of_which_a_client_has_too_few_examples_are_left_out():
    division = of_tasks("aaaabb", "xxxyyx", min_size=2)
    assert [s.client for s in division.shares] == ["a/x"] and division.left_out_rows == 3


@pytest.mark.parametrize(
    ("users", "tasks", "words"),
    [("aabb", "xyxy", "min_size = 2"), (["a/x"] * 2 + ["a"] * 2, ["y"] * 2 + ["x/y"] * 2, "'/'")],
)
def test_tasks_that_make_no_clients_are_refused(users, tasks, words):
    with pytest.raises(UserError, match=words):
        of_tasks(users, tasks, min_size=2)


def test_by_length_each_client_has_longer_texts_than_the_one_before():
    rng = np.random.default_rng(0)
    rows = {"text": ["x" * n for n in rng.integers(1, 40, 203)], "text_pair": ["y" * n for n in rng.integers(1, 40, 203)]}
    train = Dataset.from_dict({**rows, "user": ["u" * 100] * 203})
    found = partitions.divide(train, None, Clients(count=5, partition="length"), seed=0)
    lengths = [[len(rows["text"][row]) + len(rows["text_pair"][row]) for row in rows_of(share)] for share in found.shares]
    assert [len(own) for own in lengths] == [41, 41, 41, 40, 40]
    for shorter, longer in pairwise(lengths):
        assert max(shorter) <= min(longer)


def test_length_counts_the_texts_in_lists_and_mappings_and_needs_some():
    talks = [[{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}] for n in (9, 1, 5, 3)]
    by_length = Clients(count=2, partition="length", held_out=0.0)
    found = partitions.divide(Dataset.from_dict({"messages": talks}), None, by_length, seed=0)
    assert [share.train for share in found.shares] == [(1, 3), (0, 2)]
    with pytest.raises(UserError, match="have no text"):
        partitions.divide(Dataset.from_dict({"label": [1.0, 2.0, 3.0, 4.0]}), None, by_length, seed=0)


@pytest.mark.parametrize("partition", ["dirichlet", "pathological", "shards"])
def test_without_classes_partitions_by_class_are_rejected_and_the_others_named(partition):
    with pytest.raises(UserError, match=r"'iid', 'clusters', 'length' or 'natural'"):
        partitions.divide(corpus(), None, Clients(count=4, partition=partition), seed=0)
    for able in ("iid", "length", "natural"):
        assert partitions.divide(corpus(), None, Clients(count=4, partition=able), seed=0).shares
