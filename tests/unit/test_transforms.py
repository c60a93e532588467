"""Transforms, decompositions and structured products against scipy, PyWavelets and their definitions."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.numerics.circulant import circulant, circulant_linear
from graft.numerics.lu import ldu
from graft.numerics.orthogonal import block_diagonal, cayley, householder, skew
from graft.numerics.transforms import analyse, dct_matrix, synthesise, wavelet_matrix


@given(st.integers(1, 40))
def test_dct_by_its_formula(n: int) -> None:
    wanted = [[math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * j + 1) * k / (2 * n)) for j in range(n)] for k in range(n)]
    torch.testing.assert_close(dct_matrix(n), torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_plane_there_and_back_agrees_with_scipy() -> None:
    from scipy.fft import dctn

    plane = torch.randn(12, 7, dtype=torch.float64)
    there = analyse(plane, dct_matrix(12), dct_matrix(7))
    torch.testing.assert_close(there, torch.from_numpy(dctn(plane.numpy(), norm="ortho")))
    torch.testing.assert_close(synthesise(there, dct_matrix(12), dct_matrix(7)), plane)
    coefficients = torch.randn(12, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda c: synthesise(c, dct_matrix(12), dct_matrix(7)), coefficients)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4"])
@pytest.mark.parametrize(("size", "level"), [(8, 1), (16, 2), (48, 3)])
def test_wavelets_agree_with_pywavelets(wavelet: str, size: int, level: int) -> None:
    import pywt

    matrix, x = wavelet_matrix(size, wavelet, level), np.random.default_rng(0).standard_normal(size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of levels where the filter is longer than the signal
        parts = pywt.wavedec(x, wavelet, mode="periodization", level=level)
    np.testing.assert_allclose(matrix.numpy() @ x, np.concatenate(parts), atol=1e-10)
    np.testing.assert_allclose(matrix.numpy().T @ np.concatenate(parts), pywt.waverec(parts, wavelet, mode="periodization"), atol=1e-10)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-10, rtol=0)


def test_a_wavelet_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 halvings do not divide"):
        wavelet_matrix(12, "haar", 3)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_ldu_gives_the_matrix_back(m: int, n: int, seed: int) -> None:
    W = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    PL, D, U = ldu(W)
    torch.testing.assert_close(PL @ torch.diag(D) @ U, W)
    torch.testing.assert_close(U.diagonal(), torch.ones(min(m, n), dtype=torch.float64))
    assert not U.tril(-1).any()
    ordered = PL[PL.abs().argmax(0).argsort()] if m == n == 1 else PL
    assert ordered.abs().max() <= 1 + 1e-12  # partial pivoting


def test_ldu_of_a_singular_matrix_stays_finite() -> None:
    W = torch.randn(8, 3) @ torch.randn(3, 8)
    PL, D, U = ldu(W)
    assert U.isfinite().all()
    assert U.abs().max() < 1e4
    torch.testing.assert_close(PL @ torch.diag(D) @ U, W, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 9), st.integers(0, 99))
def test_cayley_is_orthogonal_and_starts_at_the_identity(n: int, seed: int) -> None:
    v = torch.randn(2, n * (n - 1) // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q = skew(v, n)
    torch.testing.assert_close(Q, -Q.mT)
    identity = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    R = cayley(Q)
    torch.testing.assert_close(R @ R.mT, identity)
    torch.testing.assert_close(R, (identity + Q) @ torch.linalg.inv(identity - Q))
    torch.testing.assert_close(cayley(torch.zeros_like(Q)), identity)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_householder_is_the_product_of_its_reflections(count: int) -> None:
    U = torch.nn.functional.normalize(torch.randn(6, count, dtype=torch.float64), dim=0).requires_grad_(True)
    wanted = torch.eye(6, dtype=torch.float64)
    for u in U.T:
        wanted = wanted @ (torch.eye(6, dtype=torch.float64) - 2 * torch.outer(u, u))
    torch.testing.assert_close(torch.eye(6, dtype=torch.float64) - U @ householder(U), wanted)
    torch.autograd.gradcheck(householder, U)


def test_blocks_on_the_diagonal() -> None:
    blocks = torch.randn(3, 2, 2)
    matrix = block_diagonal(blocks)
    assert matrix.shape == (6, 6)
    torch.testing.assert_close(matrix.view(3, 2, 3, 2).diagonal(dim1=0, dim2=2).permute(2, 0, 1), blocks)
    assert matrix.count_nonzero() == 12


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(0, 99))
def test_circulant_products_agree_with_scipy_and_the_matrix(m: int, n: int, b: int, seed: int) -> None:
    from scipy.linalg import circulant as scipy_circulant

    generator = torch.Generator().manual_seed(seed)
    kernels = torch.randn(m, n, b, dtype=torch.float64, generator=generator)
    wanted = np.block([[scipy_circulant(kernels[i, j].numpy()) for j in range(n)] for i in range(m)])
    torch.testing.assert_close(circulant(kernels), torch.from_numpy(wanted))
    x = torch.randn(2, 3, n * b, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(circulant_linear(x, kernels), x @ circulant(kernels).T)
