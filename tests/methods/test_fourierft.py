"""What only FourierFT promises: numpy's inverse transform of its spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graft
from tests.methods.small import layer, randomise


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), share=st.floats(0, 1), scale=st.floats(0.1, 200))
def test_the_update_is_the_inverse_transform(out: int, width: int, share: float, scale: float) -> None:
    model, count = layer(out, width).double(), max(1, int(share * out * width))
    (delta,) = graft.attach(model, "fourierft", count=count, scale=scale).deltas.values()
    randomise(delta)
    spectrum = np.zeros(out * width)
    spectrum[delta.places.numpy()] = delta.c.detach().numpy()
    wanted = np.fft.ifft2(spectrum.reshape(out, width)).real * scale
    torch.testing.assert_close(delta.weight()[0] - model[0].weight, torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)


def test_places_differ_and_all_of_them_can_be_had() -> None:
    (delta,) = graft.attach(layer(6, 9), "fourierft", count=54).deltas.values()
    assert sorted(delta.places.tolist()) == list(range(54))


def test_more_frequencies_than_there_are() -> None:
    with pytest.raises(graft.GraftError, match=r"count is 55, but the spectrum of maps\.0 is 6 x 9: choose 1 to 54"):
        graft.attach(layer(6, 9), "fourierft", count=55)
