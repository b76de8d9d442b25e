"""Dropout with a mask for each client."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from fedlora.models.dropout import ClientDropout


def masks(shapes: list[tuple[int, int]], seeds: list[int], width: int = 50, p: float = 0.3) -> list[Tensor]:
    """Each client's own part [rows, length, width] of ones after dropout."""
    run, longest = max(rows for _, rows in shapes), max(length for length, _ in shapes)
    with ClientDropout() as dropout:
        dropout.next_pass([torch.Generator().manual_seed(seed) for seed in seeds], shapes)
        dropped = functional.dropout(torch.ones(len(shapes) * run, longest, width), p)
    parts = dropped.unflatten(0, (len(shapes), run))
    return [part[:rows, :length] for part, (length, rows) in zip(parts, shapes, strict=True)]


def test_a_mask_is_the_clients_own_whoever_is_beside_it():
    alone, other = masks([(7, 3)], [5])[0], masks([(7, 3)], [6])[0]
    assert torch.equal(masks([(9, 4), (7, 3), (2, 1)], [1, 5, 2])[1], alone)
    assert not torch.equal(alone, other)


def test_a_mask_of_flattened_tokens_is_that_of_the_same_tokens_in_rows():
    tokens = torch.ones(3 * 4, 9, 50)
    for x in (tokens, tokens.flatten(0, 1)):
        with ClientDropout() as dropout:
            dropout.next_pass([torch.Generator().manual_seed(seed) for seed in (1, 5, 2)], [(9, 4), (7, 3), (2, 1)])
            dropped = functional.dropout(x, 0.3).view_as(tokens)
        for client, (length, rows) in enumerate([(9, 4), (7, 3), (2, 1)]):
            own = dropped.unflatten(0, (3, 4))[client, :rows, :length]
            assert torch.equal(own, masks([(length, rows)], [(1, 5, 2)[client]])[0])


def test_what_has_no_rows_is_dropped_out_of_one_client_only():
    """A table of positions, for instance, which all rows have in common."""
    table = torch.ones(24, 50)  # which two clients could share out evenly
    with ClientDropout() as dropout:
        dropout.next_pass([torch.Generator().manual_seed(1)], [(7, 3)])
        assert float((functional.dropout(table, 0.5) == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
        dropout.next_pass([torch.Generator().manual_seed(i) for i in range(2)], [(7, 3), (5, 1)])
        with pytest.raises(ValueError, match=r"dropout of a tensor \[24, 50\]"):
            functional.dropout(table, 0.5)


def test_the_kept_part_is_scaled_and_of_the_right_size():
    (found,) = masks([(100, 20)], [0])
    assert found.unique().tolist() == pytest.approx([0.0, 256 / (256 - 77)])  # 0.3 is nearest to 77 / 256
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)


def test_attention_with_dropout_of_nothing_is_torchs_and_with_dropout_right_on_average():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    hidden = torch.rand(2, 1, 6, 6) < 0.3
    for named in ({}, {"is_causal": True}, {"attn_mask": ~hidden | torch.eye(6, dtype=torch.bool)}, {"scale": 0.5}):
        plain = functional.scaled_dot_product_attention(query, key, value, **named)
        with ClientDropout() as dropout:
            dropout.next_pass([torch.Generator().manual_seed(1)], [(6, 2)])
            same = functional.scaled_dot_product_attention(query, key, value, **named)
            many = [functional.scaled_dot_product_attention(query, key, value, dropout_p=0.2, **named) for _ in range(600)]
        assert torch.equal(same, plain)
        assert_close(torch.stack(many).mean(0), plain, atol=0.1, rtol=0.1)
        assert not torch.equal(many[0], many[1])


def test_the_gradient_passes_where_the_input_passed():
    x = torch.ones(4, 5, 6, requires_grad=True)
    with ClientDropout() as dropout:
        dropout.next_pass([torch.Generator().manual_seed(1)], [(5, 4)])
        y = functional.dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
