# ruff: noqa: F811  (a fixture)
"""Division of a step into micro-batches."""

import gc
from dataclasses import replace

import torch

from batched_jobs import TASK, drawn, session  # noqa: F401  (a fixture)
from fedlora.train.micro_batches import bytes_per_token, micro_batches


def test_micro_batches_take_every_batch_once_and_similar_lengths_together():
    sizes = [(9, 4), (30, 4), (10, 4), (31, 2), (8, 4)]
    found = list(micro_batches(sizes, max_tokens=120))
    assert found == [[0, 2, 4], [1], [3]]
    assert list(micro_batches(sizes, max_tokens=10_000)) == [[0, 1, 2, 3, 4]]
    assert sorted(micro_batches(sizes, max_tokens=1)) == [[0], [1], [2], [3], [4]]


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
