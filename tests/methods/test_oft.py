"""What only OFT promises: rotations within blocks, what they keep, and PEFT's two kinds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.oft import OFTDelta
from tests import tiny
from tests.methods.small import as_peft, conv, layer, randomise

quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's


def oft(model: nn.Module, size: float = 0.5, **options: Any) -> OFTDelta:
    (delta,) = graft.attach(model, "oft", **options).deltas.values()
    assert isinstance(delta, OFTDelta)
    randomise(delta, size=size)
    return delta


def skew_blocks(delta: OFTDelta) -> Tensor:
    """Q [in, in], entry by entry."""
    width, b = delta.target.shape[1], delta.block
    Q = torch.zeros(width, width, dtype=delta.q.dtype)
    for k in range(width // b):
        values = iter(delta.q.detach()[k % len(delta.q)])
        for i in range(b):
            for j in range(i + 1, b):
                Q[k * b + i, k * b + j] = value = next(values)
                Q[k * b + j, k * b + i] = -value
    return Q


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 6), block=st.integers(2, 4), count=st.integers(1, 3), share=st.booleans())
def test_rotation_keeps_the_angles_between_neurons(out: int, block: int, count: int, share: bool) -> None:
    """W' = W (I - Q)^-1 (I + Q): W' W'^T = W W^T, and the negative of q turns back."""
    model = layer(out, block * count).double()
    delta = oft(model, block=block, share=share)
    assert delta.q.shape == (1 if share else count, block * (block - 1) // 2)
    Q, identity, W = skew_blocks(delta), torch.eye(block * count, dtype=torch.float64), model[0].weight.detach()
    adapted = delta.weight()[0].detach()
    torch.testing.assert_close(adapted, W @ torch.linalg.inv(identity - Q) @ (identity + Q))
    torch.testing.assert_close(adapted @ adapted.T, W @ W.T)
    with torch.no_grad():
        delta.q.neg_()
    torch.testing.assert_close(delta.times(adapted), W)


@pytest.mark.parametrize("terms", [4, 5, 8])
def test_the_series_is_the_rotation_up_to_its_last_power(terms: int) -> None:
    """In the other direction; the error has the order Q^(n - 1), half of which is there."""
    errors = []
    for size in (0.02, 0.01):
        model = layer(5, 6).double()
        delta, Q = oft(model, size, block=3, terms=terms), None
        Q = skew_blocks(delta)
        powers = [torch.linalg.matrix_power(-Q, k) for k in range(terms)]
        R = powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
        torch.testing.assert_close(delta.weight()[0], model[0].weight @ R, rtol=1e-12, atol=1e-12)
        identity = torch.eye(6, dtype=torch.float64)
        errors.append((R - torch.linalg.inv(identity + Q) @ (identity - Q)).norm())
    assert errors[0] / errors[1] == pytest.approx(2 ** (terms - 1), rel=0.1)


@settings(max_examples=100, deadline=None)
@given(width=st.integers(2, 200), wanted=st.integers(2, 64))
def test_sizes_are_peft_s_but_never_one(width: int, wanted: int) -> None:
    from peft.tuners.oft.layer import OFTLayer

    theirs = wanted if width % wanted == 0 else OFTLayer.adjust_oft_parameters(None, width, wanted)
    if theirs > 1:
        assert graft.methods()["oft"].cost(3, width, block=wanted) == width * (theirs - 1) // 2
    else:
        assert graft.methods()["oft"].cost(3, width, block=wanted) > 0


@quiet
@pytest.mark.parametrize("options", [{"terms": 5}, {"terms": 8, "share": True}, {"share": True}])
def test_peft_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    import peft

    model, batch = tiny.llama(bias=True), {"input_ids": torch.arange(1, 12)[None]}
    adapter = graft.attach(model, "oft", block=4, **options)
    for delta in adapter.deltas.values():
        randomise(delta, size=0.3)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.llama(bias=True), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


@quiet
def test_a_convolution_is_what_peft_merges(tmp_path: Path) -> None:
    import peft

    model = conv()
    delta = oft(model, block=6)
    graft.adapters_of(model)["default"].save(tmp_path)
    plain = conv()
    merged = peft.PeftModel.from_pretrained(plain, str(tmp_path)).merge_and_unload()
    torch.testing.assert_close(merged[0].weight.flatten(1), delta.weight()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coft": True}, "coft = True, and Graft has False only"),
        ({"bias": "oft_only"}, "bias = 'oft_only'"),
        ({"use_cayley_neumann": True}, r"before PEFT 0\.18"),
        ({"use_cayley_neumann": True, "peft_version": "0.21.2", "num_cayley_neumann_terms": 2}, "terms is 2"),
        ({"oft_block_size": 0, "r": 9}, "different widths"),
    ],
)
def test_what_peft_has_beyond_it_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    graft.attach(tiny.llama(), "oft", block=5).save(tmp_path)
    as_peft(tmp_path, **change)
    with pytest.raises(graft.GraftError, match=message):
        graft.load_adapter(tiny.llama(), tmp_path)


def test_one_input_cannot_be_rotated() -> None:
    with pytest.raises(graft.GraftError, match="one input"):
        graft.attach(layer(5, 1), "oft")
