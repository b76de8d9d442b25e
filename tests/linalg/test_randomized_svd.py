from itertools import pairwise

import pytest
import torch

from fedlora.linalg.randomized_svd import first_sketch, fit_from_sketch, gaussian_matrix, range_basis, second_sketch

from twins import IN, apart, drifted_terms, random_terms, total, truncated


def ask(terms, rank, width, iterations):
    dtype = terms[0][1].b.dtype
    omega = gaussian_matrix(IN, width, torch.Generator().manual_seed(0), dtype)
    for _ in range(iterations + 1):
        basis = range_basis(sum(w * first_sketch(f, omega) for w, f in terms))
        answers = sum(w * second_sketch(f, basis) for w, f in terms)
        omega = answers.mT
    return fit_from_sketch(answers, basis, rank)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_a_width_of_all_ranks_is_exact(dtype, close):
    terms = random_terms((2, 3, 2), dtype=dtype)
    assert apart(ask(terms, 4, width=7, iterations=0).product(), truncated(total(terms), 4)) < close


def test_two_power_iterations_are_within_one_percent_of_the_least_error():
    terms = drifted_terms(10, 3, 0.5)
    least = apart(truncated(total(terms), 3), total(terms))
    assert least <= apart(ask(terms, 3, width=6, iterations=2).product(), total(terms)) < 1.01 * least


def test_power_iterations_do_not_hurt():
    terms = drifted_terms(10, 3, 1.0)
    errors = [apart(ask(terms, 3, width=5, iterations=q).product(), total(terms)) for q in range(4)]
    assert all(later <= before + 1e-12 for before, later in pairwise(errors))


def test_answers_are_the_dense_products():
    (_, factor), basis = random_terms((3,), batch=(2,))[0], torch.randn(30, 4).double().expand(2, -1, -1)
    assert apart(second_sketch(factor, basis), basis.mT @ factor.product()) < 1e-13
