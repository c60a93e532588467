"""Singular values and principal components against torch's full SVD and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.decomposition import IncrementalPCA as Oracle
from torch import Tensor

from graft.numerics.pca import IncrementalPCA
from graft.numerics.svd import fix_signs, truncated_svd


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(rows: int, columns: int, singular: Tensor, seed: int = 0) -> Tensor:
    U, V = torch.linalg.qr(random(rows, len(singular), seed=seed)).Q, torch.linalg.qr(random(columns, len(singular), seed=seed + 1)).Q
    return (U * singular) @ V.T


def aligned(seen: Tensor, wanted: Tensor) -> Tensor:
    """``seen`` with the sign of each row taken from ``wanted``."""
    return seen * (seen * wanted).sum(1, keepdim=True).sign()


# ---- singular values ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), rank=st.integers(1, 30), seed=st.integers(0, 5))
def test_small_matrices_get_the_exact_svd(rows: int, columns: int, rank: int, seed: int) -> None:
    matrix = random(rows, columns, seed=seed)
    rank = min(rank, rows, columns)
    U, S, Vh = truncated_svd(matrix, rank)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(S, exact.S[:rank])
    torch.testing.assert_close((U * S) @ Vh, (exact.U[:, :rank] * exact.S[:rank]) @ exact.Vh[:rank])
    torch.testing.assert_close(U.T @ U, torch.eye(rank, dtype=U.dtype))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(rank, dtype=U.dtype))


@pytest.mark.parametrize(("rows", "columns"), [(220, 170), (170, 220)])
@pytest.mark.parametrize("decay", [0.8, 0.97], ids=["steep", "flat"])
def test_the_randomised_branch_finds_the_same_triplets(rows: int, columns: int, decay: float) -> None:
    """(8 + 16) * 3 < 170: the range finder runs, and power iterations make it right where the spectrum is flat, too."""
    singular = decay ** torch.arange(170, dtype=torch.float64)
    matrix = with_spectrum(rows, columns, singular)
    U, S, Vh = truncated_svd(matrix, 8)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(S, exact.S[:8], rtol=1e-3, atol=0)
    error = (matrix - (U * S) @ Vh).square().sum() / exact.S[8:].square().sum()
    assert error < 1.001  # no more than the best rank-8 approximation leaves
    torch.testing.assert_close(U.T @ U, torch.eye(8, dtype=U.dtype))


def test_the_randomised_branch_really_runs_and_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same result whatever the global generator's state, and it leaves that state alone; the full SVD sees a thin matrix only."""
    shapes = []
    full = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **options: shapes.append(tuple(matrix.shape)) or full(matrix, **options))
    matrix = random(200, 150)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = truncated_svd(matrix, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for seen, wanted in zip(truncated_svd(matrix, 4), first, strict=True):
        assert torch.equal(seen, wanted)
    assert shapes == [(20, 150)] * 2
    assert not torch.equal(truncated_svd(matrix, 4, seed=1)[0], first[0])  # the seed counts


def test_low_precision_is_computed_in_fp32_and_fp64_stays() -> None:
    matrix = random(20, 10)
    assert truncated_svd(matrix, 2)[1].dtype == torch.float64
    assert truncated_svd(matrix.bfloat16(), 2)[1].dtype == torch.float32
    torch.testing.assert_close(truncated_svd(matrix.bfloat16(), 2)[1], torch.linalg.svd(matrix.bfloat16().float()).S[:2])


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), rank=st.integers(1, 4), seed=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_fixed_signs(rows: int, columns: int, rank: int, seed: int) -> None:
    """The product stays, the largest entry of each row of Vh is positive, and flipped pairs come out alike."""
    U, Vh = random(rows, rank, seed=seed), random(rank, columns, seed=seed + 1)
    signs = torch.where(random(rank, seed=seed + 2) > 0, 1.0, -1.0)
    fixed_U, fixed_Vh = fix_signs(U, Vh)
    torch.testing.assert_close(fixed_U @ fixed_Vh, U @ Vh)
    assert (fixed_Vh.gather(1, fixed_Vh.abs().argmax(1, keepdim=True)) > 0).all()
    other_U, other_Vh = fix_signs(U * signs, Vh * signs[:, None])
    assert torch.equal(other_U, fixed_U)
    assert torch.equal(other_Vh, fixed_Vh)


def test_a_zero_row_keeps_its_partner() -> None:
    U, Vh = fix_signs(torch.tensor([[2.0, -3.0]]), torch.tensor([[0.0, 0.0], [-1.0, 0.5]]))
    assert U.tolist() == [[2.0, 3.0]]
    assert Vh.tolist() == [[0.0, 0.0], [1.0, -0.5]]


# ---- principal components -----------------------------------------------------------------------------------------------


def run(pca: IncrementalPCA, rows: Tensor, portions: list[int]) -> IncrementalPCA:
    for portion in rows.split(portions):
        pca.update(portion)
    pca.finish()
    assert pca.components is not None
    return pca


@settings(max_examples=30, deadline=None)
@given(portions=st.lists(st.integers(1, 9), min_size=1, max_size=6), features=st.integers(1, 7), seed=st.integers(0, 5))
def test_portions_of_any_size_give_the_pca_of_all_rows(portions: list[int], features: int, seed: int) -> None:
    """With room for every direction nothing is forgotten; portions smaller than the rank wait for company."""
    rows = random(sum(portions), features, seed=seed) * (1 + torch.arange(features)) + 5 * random(features, seed=seed + 1)
    pca = run(IncrementalPCA(features), rows, portions)
    centred = rows - rows.mean(0)
    exact = torch.linalg.svd(centred, full_matrices=False)
    found = min(len(pca.singular_values), len(exact.S))
    torch.testing.assert_close(pca.singular_values[:found], exact.S[:found], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(pca.mean, rows.mean(0))
    assert pca.count == len(rows)
    if len(rows) > 1:
        torch.testing.assert_close(pca.ratio[:found], (exact.S.square() / centred.square().sum())[:found], atol=1e-9, rtol=1e-9)
    scatter = (pca.components.T * pca.singular_values.square()) @ pca.components  # type: ignore[union-attr]
    torch.testing.assert_close(scatter, centred.T @ centred, atol=1e-8, rtol=1e-8)


def test_ratios_and_directions_equal_sklearn() -> None:
    rows = random(60, 9) @ random(9, 9, seed=3) + random(9, seed=4)
    ours, theirs = run(IncrementalPCA(4), rows, [60]), PCA(4, svd_solver="full").fit(rows.numpy())
    components = torch.tensor(theirs.components_)
    torch.testing.assert_close(aligned(ours.components, components), components)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.ratio, torch.tensor(theirs.explained_variance_ratio_))
    torch.testing.assert_close(ours.singular_values, torch.tensor(theirs.singular_values_))


def test_forgetting_equals_sklearn() -> None:
    """With less room than directions the tail of each update is lost, in the same way as in scikit-learn's IncrementalPCA."""
    rows = random(70, 12) @ random(12, 12, seed=3) + 3 * random(12, seed=4)
    theirs = Oracle(5)
    for portion in rows.split([20, 30, 20]):
        theirs.partial_fit(portion.numpy())
    ours = run(IncrementalPCA(5), rows, [20, 30, 20])
    components = torch.tensor(theirs.components_)
    torch.testing.assert_close(aligned(ours.components, components), components)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.singular_values, torch.tensor(theirs.singular_values_))
    torch.testing.assert_close(ours.ratio, torch.tensor(theirs.explained_variance_ratio_))


def test_small_portions_are_kept_back_until_they_fill_the_rank() -> None:
    """Four portions of 2 rows at rank 5 are one portion of 6 and one of 2, not four updates that forget most of what they saw."""
    rows = random(8, 12)
    ours = run(IncrementalPCA(5), rows, [2, 2, 2, 2])
    wanted = run(IncrementalPCA(5), rows, [6, 2])
    assert torch.equal(ours.components, wanted.components)  # type: ignore[arg-type]
    early = IncrementalPCA(5)
    early.update(rows[:4])
    assert early.components is None
    early.update(rows[4:6])
    assert early.count == 6


def test_fewer_rows_than_the_rank() -> None:
    rows = random(3, 12)
    pca = run(IncrementalPCA(5), rows, [2, 1])
    torch.testing.assert_close(pca.ratio.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert len(pca.singular_values) == 3


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_data_explains_nothing(value: float) -> None:
    """0 / 0, and rounding left over from the mean, are zero variance, not a direction."""
    pca = run(IncrementalPCA(3), torch.full((50, 6), value), [20, 20, 10])
    assert pca.ratio.tolist() == [0.0] * 3


def test_low_precision_rows_are_taken_in_fp32() -> None:
    rows = random(40, 6)
    pca = run(IncrementalPCA(3), rows.bfloat16(), [25, 15])
    assert pca.components is not None
    assert pca.components.dtype == torch.float32
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(3))
