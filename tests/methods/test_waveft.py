"""What only WaveFT promises: PEFT's transform for each of its wavelets, coefficients that are orthonormal directions, and local updates."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.waveft import WaveFTDelta, Wavelet
from tests import tiny
from tests.methods.small import layer, quiet_peft, randomise


def waveft(model: nn.Module, seed: int = 1, **options: object) -> WaveFTDelta:
    (delta,) = graft.attach(model, "waveft", **options).deltas.values()
    assert isinstance(delta, WaveFTDelta)
    randomise(delta, seed)
    return delta


def difference(delta: WaveFTDelta) -> Tensor:
    return (delta.weight()[0] - delta.target.weight()).detach()


@quiet_peft
@pytest.mark.parametrize("wavelet", get_args(Wavelet))
def test_every_wavelet_is_peft_s(wavelet: str) -> None:
    """Odd and even sides, shorter and longer than the filters."""
    import peft

    for out, width in ((6, 9), (9, 6), (7, 7), (40, 33)):
        delta = waveft(layer(out, width), count=30, scale=3.0, wavelet=wavelet, places_seed=5)
        config = peft.WaveFTConfig(target_modules=["maps.0"], n_frequency=30, scaling=3.0, wavelet_family=wavelet, random_loc_seed=5)
        theirs = peft.get_peft_model(layer(out, width), config).base_model.model.maps[0]
        with torch.no_grad():
            theirs.waveft_spectrum["default"].copy_(delta.c)
        torch.testing.assert_close(difference(delta), theirs.get_delta_weight("default").detach(), atol=1e-6, rtol=1e-4)


def test_peft_has_no_other_wavelet_that_is_right() -> None:
    """None that PEFT can compute is missing, but the two whose filters are wrong there."""
    import pywt
    from peft.tuners.waveft import wavelet

    for name in wavelet._WAVELET_COEFFS:
        theirs, own = wavelet.Wavelet(name), pywt.Wavelet(name)
        right = len(theirs) == own.rec_len and max(abs(a - b) for a, b in zip(theirs.rec_lo, own.rec_lo, strict=True)) < 1e-6
        assert right == (name in get_args(Wavelet))


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 99))
def test_haar_by_hand(out: int, width: int, seed: int) -> None:
    """Every coefficient fills a 2 x 2 square with +-1/2; where a side is odd, the last row or column is cut."""
    delta = waveft(layer(out, width).double(), count=out * width, scale=3.0, places_seed=seed)
    expected = torch.zeros(out + out % 2, width + width % 2, dtype=torch.float64)
    half_out, half_in = len(expected) // 2, expected.shape[1] // 2
    places = torch.randperm(out * width, generator=torch.Generator().manual_seed(seed))
    for place, value in zip(places.tolist(), delta.c.tolist(), strict=True):
        row, column = divmod(place, width)
        signs = [[1.0, 1.0], [1.0, 1.0]]
        lower, right = row >= half_out, column >= half_in
        for i in (0, 1):
            for j in (0, 1):  # right quarters change sign from row to row, lower ones from column to column: PEFT
                signs[i][j] = (-1.0) ** (right * i + lower * j)
        i, j = 2 * (row % half_out), 2 * (column % half_in)
        expected[i : i + 2, j : j + 2] += torch.tensor(signs, dtype=torch.float64) * value / 2
    torch.testing.assert_close(difference(delta), 3.0 * expected[:out, :width])


@pytest.mark.parametrize("wavelet", ["db1", "db3", "sym4", "coif1"])
def test_coefficients_are_orthonormal_directions(wavelet: str) -> None:
    """Away from the borders, where a filter is cut; for Haar and even sides all of them."""
    out, width = 24, 20
    delta = waveft(layer(out, width).double(), count=out * width, scale=1.0, wavelet=wavelet)
    basis = torch.autograd.functional.jacobian(
        lambda c: torch.func.functional_call(delta, {"c": c}, (torch.eye(width, dtype=torch.float64),)), delta.c.detach()
    )
    vectors = basis.reshape(width * out, -1).T
    whole = vectors.norm(dim=1) > 1 - 1e-6  # nothing of it was cut
    assert whole.sum() >= (out * width if wavelet == "db1" else out * width / 6)
    gram = vectors[whole] @ vectors[whole].T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-6, rtol=0)


def test_gradients_equal_autograd_through_a_dense_basis() -> None:
    model = layer().double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    delta = waveft(model, count=20, wavelet="db2", scale=2.0)
    basis = []
    values = delta.c.detach().clone()
    for k in range(20):
        with torch.no_grad():
            delta.c.copy_(F.one_hot(torch.tensor(k), 20))
        basis.append(difference(delta))
    with torch.no_grad():
        delta.c.copy_(values)
    x, c = torch.randn(5, 9, dtype=torch.float64), values.clone().requires_grad_(True)
    expected = F.linear(x, W + torch.einsum("k,koi->oi", c, torch.stack(basis)), b)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    torch.testing.assert_close(delta.c.grad, torch.autograd.grad(expected.square().sum(), c)[0])


def test_a_haar_update_touches_four_entries_a_coefficient() -> None:
    delta = waveft(layer(40, 50), count=10)
    assert 0 < int((difference(delta) != 0).sum()) <= 40


def test_targets_of_one_shape_share_their_places_and_seeds_change_them() -> None:
    adapter = graft.attach(tiny.llama(), "waveft", targets=["q_proj", "o_proj"], count=40)
    first, *others = [delta.places for delta in adapter.deltas.values() if delta.target.shape == (40, 36)]
    assert others
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, waveft(layer(40, 36), count=40, places_seed=1).places)


def test_too_many_coefficients_are_refused() -> None:
    assert len(waveft(layer(), count=54).c) == 54
    with pytest.raises(graft.GraftError, match=r"6 x 9: choose 1 to 54"):
        waveft(layer(), count=55)


def test_a_missing_pywavelets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(graft.GraftError, match=r"graft\[wavelets\]"):
        waveft(layer(), count=5)


@quiet_peft
def test_peft_without_its_transform_is_refused(tmp_path: Path) -> None:
    import peft

    config = peft.WaveFTConfig(target_modules=["maps.0"], n_frequency=5, use_idwt=False)
    peft.get_peft_model(layer(), config).save_pretrained(str(tmp_path))
    with pytest.raises(graft.GraftError, match="use_idwt = False"):
        graft.load_adapter(layer(), tmp_path)


def test_the_size_of_the_update_is_that_of_the_coefficients() -> None:
    """Haar's transform of even sides is orthonormal."""
    delta = waveft(layer(8, 10).double(), count=30, scale=1.0)
    assert math.isclose(float(difference(delta).norm()), float(delta.c.detach().norm()), rel_tol=1e-9)
