# ruff: noqa: F811  (a fixture)
"""Division of a step into micro-batches."""

import gc
from dataclasses import replace

import pytest
import torch

from batched_jobs import TASK, drawn, session  # noqa: F401  (a fixture)
from fedlora.train.micro_batches import bytes_per_token, micro_batches, passes


def test_micro_batches_take_every_batch_once_and_similar_lengths_together():
    sizes = [(9, 4), (30, 4), (10, 4), (31, 2), (8, 4)]
    found = list(micro_batches(sizes, max_tokens=120))
    assert found == [[0, 2, 4], [1], [3]]
    assert list(micro_batches(sizes, max_tokens=10_000)) == [[0, 1, 2, 3, 4]]
    assert sorted(micro_batches(sizes, max_tokens=1)) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 9, 20, 1000])
def test_a_split_batch_has_every_row_once_in_passes_that_fit(max_tokens, packed):
    lengths = torch.tensor([3, 9, 2, 2, 7, 5, 1, 1, 8])
    batches = [torch.tensor([4, 1, 0, 2]), torch.tensor([3]), torch.tensor([5, 8, 7, 6])]
    found = list(passes(batches, lengths, max_tokens, packed, split=True))
    for place, batch in enumerate(batches):
        own = [(one.rows[one.places.index(place)], one.first, one.last) for one in found if place in one.places]
        assert torch.equal(torch.cat([rows for rows, _, _ in own]), batch)
        assert [first for _, first, _ in own] == [True, *[False] * (len(own) - 1)]
        assert [last for _, _, last in own] == [*[False] * (len(own) - 1), True]
    for one in found:
        longest, each = max(int(lengths[rows].max()) for rows in one.rows), max(len(rows) for rows in one.rows)
        tokens = sum(int(lengths[rows].sum()) for rows in one.rows) if packed else longest * each * len(one.rows)
        assert tokens <= max_tokens or [len(rows) for rows in one.rows] == [1]


def test_without_splitting_every_batch_is_whole():
    lengths, batches = torch.full((6,), 9), [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
    found = list(passes(batches, lengths, 1, packed=True, split=False))
    assert [[rows.tolist() for rows in one.rows] for one in found] == [[[0, 1, 2]], [[3, 4, 5]]]
    assert all(one.first and one.last for one in found)


def test_the_memory_of_a_token_is_that_of_what_is_kept_for_the_backward_pass(session):
    adapted, examples = session
    found = bytes_per_token(adapted, TASK, examples, drawn(adapted, 4, 0))
    hidden, layers = 32, 2
    assert 4 * hidden * layers * 8 < found < 4 * hidden * layers * 80
    assert all(layer.part is None for layer in adapted.layers.values())  # the model is as it was
    nothing = replace(examples, starts=examples.starts[:1])
    assert bytes_per_token(adapted, TASK, nothing, drawn(adapted, 4, 0)) == 1


def test_measuring_the_memory_of_a_token_leaves_no_graph_behind(session):
    adapted, examples = session

    def live():
        gc.collect()
        return sum(type(x) in (torch.Tensor, torch.nn.Parameter) for x in gc.get_objects())

    before = live()
    bytes_per_token(adapted, TASK, examples, drawn(adapted, 4, 0))
    assert live() == before
