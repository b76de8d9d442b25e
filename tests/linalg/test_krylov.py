import pytest
import torch

from fedlora.linalg import fit
from fedlora.linalg.fit import best_fit
from fedlora.linalg.krylov import converged_basis
from fedlora.linalg.lowrank import LowRank

from twins import apart, drifted_terms, total, truncated

SHAPE = {"out": 260, "in_": 200}


def of_spectrum(s):
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, len(s), generator=rng, dtype=torch.float64)).Q for n in (260, 200))
    return LowRank(b=u * s, a=v.mT)


@pytest.mark.parametrize("form", [lambda f: f, LowRank.product])
def test_a_converged_basis_attains_the_least_error(form):
    factor = of_spectrum(torch.arange(1, 151, dtype=torch.float64) ** -1.0)
    basis = converged_basis(form(factor), rank=8, width=16, steps=8)
    product = factor.product()
    assert apart(product @ basis @ basis.mT, truncated(product, 8), scale=product) < 1e-6


def test_a_flat_spectrum_is_refused_and_not_guessed():
    assert (
        converged_basis(of_spectrum(torch.ones(150).double() + 1e-3 * torch.rand(150)), rank=8, width=16, steps=6) is None
    )


def test_a_matrix_of_smaller_rank_than_asked_for_converges():
    factor = of_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    basis = converged_basis(factor, rank=8, width=16, steps=6)
    assert apart(factor.product() @ basis @ basis.mT, factor.product()) < 1e-12
    assert apart(basis.mT @ basis, torch.eye(8)) < 1e-12


@pytest.mark.parametrize("count", [30, 90])  # fewer and more ranks than columns
@pytest.mark.parametrize("drift", [0, 1e-3, 0.5, 10])
def test_the_iterative_and_the_exact_path_agree(monkeypatch, count, drift):
    terms = drifted_terms(count, 4, drift, dtype=torch.float32, **SHAPE)
    tried = []
    monkeypatch.setattr(fit, "converged_basis", lambda *x: tried.append(converged_basis(*x)) or tried[-1])
    monkeypatch.setattr(fit, "_affordable_steps", lambda shape, width: 8)
    iterative = best_fit(terms, 4).product()
    assert tried
    monkeypatch.setattr(fit, "_affordable_steps", lambda shape, width: 0)
    assert apart(iterative, best_fit(terms, 4).product(), scale=total(terms)) < 1e-6
    assert len(tried) == 1


def test_a_batch_converges_as_a_whole():
    terms = drifted_terms(20, 4, 0.3, batch=(3,), **SHAPE)
    dense = total(terms)
    basis = converged_basis(dense, rank=4, width=12, steps=8)
    assert apart(dense @ basis @ basis.mT, truncated(dense, 4)) < 1e-6
