"""What every kind of part keeps."""

from dataclasses import fields
from typing import get_args

import pytest
import torch
from kinds import drawn, examples, update
from torch.testing import assert_close

from fedlora.parts.table import Part, as_trained, stacked

every_kind = pytest.mark.parametrize("kind", get_args(Part), ids=lambda kind: kind.__name__)
every_size = pytest.mark.parametrize("size", [(5, 7), (7, 5), (6, 6)], ids=str)
SCALES = (0.5, 3.0)


@every_kind
@every_size
def test_two_factors_and_the_shapes_are_those_of_the_matrix(kind, size):
    part = examples(*size, rank=3)[kind]
    assert part.shapes(*size) == {field.name: tuple(getattr(part, field.name).shape) for field in fields(part)}
    if (product := part.product()) is None:
        assert part.as_two_factors() is None
    else:
        assert_close(part.as_two_factors().product(), product)


@every_kind
@every_size
def test_clients_of_unequal_ranks_together_compute_what_each_computes_alone(kind, size):
    parts = [examples(*size, rank=rank)[kind] for rank in (3, 1)]
    if len({part.structure for part in parts}) > 1:
        parts = [parts[0], parts[0]]
    trained = [as_trained(part, scale) for part, scale in zip(parts, SCALES, strict=True)]
    x, dropped, scale = drawn(2, 4, size[1]), drawn(2, 4, size[1], seed=1), torch.tensor(SCALES).double()[:, None, None]
    together = update(stacked(trained), x, dropped, scale, size)
    for i, part in enumerate(trained):
        own = slice(i, i + 1)
        assert_close(together[i], update(stacked([part]), x[own], dropped[own], scale[own], size)[0])


@every_kind
@every_size
def test_factors_as_trained_compute_the_matrix_whatever_the_scale(kind, size):
    part = examples(*size, rank=2)[kind]
    x = drawn(1, 4, size[1])
    scales = [torch.full((1, 1, 1), scale).double() for scale in SCALES]
    each = [update(stacked([as_trained(part, float(scale))]), x, x, scale, size) for scale in scales]
    assert_close(each[0], each[1])
    if (product := part.product()) is not None:
        assert_close(each[0], x @ product.mT)


@every_kind
@every_size
def test_token_ids_stand_for_rows_of_the_identity(kind, size):
    parts = [as_trained(examples(*size, rank=2)[kind], scale) for scale in SCALES]
    ids = torch.tensor([[0, 3, 4, 3], [2, 2, 1, 0]])
    rows, scale = torch.eye(size[1]).double()[ids], torch.tensor(SCALES).double()[:, None, None]
    assert_close(update(stacked(parts), ids, ids, scale, size), update(stacked(parts), rows, rows, scale, size))
