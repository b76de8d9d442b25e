"""The filter of gradients against its matrix."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fedlora.train.gradient_filter import binomial5, filter_gradients


def matrix(n: int) -> torch.Tensor:
    return binomial5(torch.eye(n, dtype=torch.float64), 0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 20])
def test_its_matrix_is_symmetric_with_rows_of_sum_one_and_known_eigenvalues(n):
    f = matrix(n)
    assert_close(f, f.mT)
    assert_close(f.sum(1), torch.ones(n, dtype=torch.float64))
    expected = [math.cos(math.pi * j / (2 * n)) ** 4 for j in reversed(range(n))]
    assert_close(torch.linalg.eigvalsh(f), torch.tensor(expected, dtype=torch.float64))


def test_in_the_middle_it_is_a_convolution_with_a_binomial_kernel():
    assert_close(matrix(9)[4] * 16, torch.tensor([0, 0, 1, 4, 6, 4, 1, 0, 0], dtype=torch.float64))
    assert matrix(40)[20].square().sum() == pytest.approx(70 / 256)  # what it keeps of the variance of white noise


def test_the_ends_are_continued_by_their_mirror_image():
    x = torch.arange(6, dtype=torch.float64) ** 2
    mirrored = torch.cat([x[:2].flip(0), x, x[-2:].flip(0)])
    kernel = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16
    assert_close(binomial5(x, 0), nn.functional.conv1d(mirrored[None, None], kernel[None, None])[0, 0])


def test_b_is_filtered_along_out_and_a_along_in_for_each_rank_and_client_apart():
    shapes = {"m.b": (2, 7, 3), "m.a": (2, 3, 5), "head.w": (2, 4)}
    parameters = {key: nn.Parameter(torch.zeros(shape)) for key, shape in shapes.items()}
    gradients = {key: torch.randn(shape) for key, shape in shapes.items()}
    for key, x in parameters.items():
        x.grad = gradients[key].clone()
    filter_gradients(parameters, None)
    assert all(torch.equal(x.grad, gradients[key]) for key, x in parameters.items())
    filter_gradients(parameters, "binomial5")
    assert torch.equal(parameters["head.w"].grad, gradients["head.w"])
    assert_close(parameters["m.b"].grad, matrix(7).float() @ gradients["m.b"])
    assert_close(parameters["m.a"].grad, gradients["m.a"] @ matrix(5).float())
    order = torch.tensor([2, 0, 1])
    assert_close(binomial5(gradients["m.b"][..., order], -2), parameters["m.b"].grad[..., order])
    features = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(binomial5(gradients["m.b"][:, features], -2), parameters["m.b"].grad[:, features])
