"""What only WaRA promises: low rank on wavelet coefficients, and what that is without gains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import graft
from graft.numerics.transforms import wavelet_matrix
from tests.methods.small import layer, randomise


def update(model: torch.nn.Module) -> Tensor:
    return model[0].graft.deltas["default"].weight()[0].detach() - model[0].weight.detach()


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("factors", ["shared", "own"])
def test_the_definition(wavelet: str, factors: str) -> None:
    model = layer(12, 16).double()
    (delta,) = graft.attach(model, "wara", rank=2, wavelet=wavelet, factors=factors, alpha=1.0).deltas.values()
    randomise(delta)
    pairs = [delta.B[0] @ delta.A[0] * g for g in delta.gains] if factors == "shared" else [B @ A for B, A in zip(delta.B, delta.A, strict=True)]
    T_out, T_in = wavelet_matrix(12, wavelet, 1), wavelet_matrix(16, wavelet, 1)
    torch.testing.assert_close(update(model), 0.5 * T_out.T @ torch.block_diag(*pairs) @ T_in)
    assert torch.linalg.matrix_rank(update(model)) == 4


def test_without_gains_haar_disappears() -> None:
    """A control that whoever believes in the wavelet should know: (B A) kron I_2."""
    model = layer(12, 16).double()
    (delta,) = graft.attach(model, "wara", rank=2).deltas.values()
    randomise(delta)
    with torch.no_grad():
        delta.gains.fill_(1)
    torch.testing.assert_close(update(model), 2 * torch.kron(delta.B[0] @ delta.A[0], torch.eye(2, dtype=torch.float64)).detach())


def test_the_low_half_alone_is_smooth() -> None:
    model = layer(12, 16).double()
    (delta,) = graft.attach(model, "wara", rank=2).deltas.values()
    randomise(delta)
    with torch.no_grad():
        delta.gains.copy_(torch.tensor([1.0, 0.0]))
    pieces = update(model).view(6, 2, 8, 2)
    torch.testing.assert_close(pieces, pieces.mean((1, 3), keepdim=True).expand_as(pieces))


def test_odd_sizes_are_cut_from_even_ones() -> None:
    model = layer(7, 9).double()
    (delta,) = graft.attach(model, "wara", rank=2, alpha=2.0).deltas.values()
    randomise(delta)
    assert delta.A.shape == (1, 2, 5)
    assert delta.B.shape == (1, 4, 2)
    block = torch.block_diag(*[delta.B[0] @ delta.A[0] * g for g in delta.gains])
    whole = wavelet_matrix(8, "haar", 1).T @ block @ wavelet_matrix(10, "haar", 1)
    torch.testing.assert_close(update(model), whole[:7, :9].detach())


def test_without_pywavelets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pywt", None)
    wavelet_matrix.cache_clear()
    with pytest.raises(graft.GraftError, match=r"pip install 'graft\[wavelets\]'"):
        graft.attach(layer(12, 16), "wara", rank=2)
