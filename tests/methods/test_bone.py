"""What only Bone promises: blocks of W times a block that a row or a column of them shares."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.methods.deltas.bone import BoneDelta
from tests import tiny
from tests.methods.small import layer, randomise


def bone(model: nn.Module, **options: object) -> BoneDelta:
    (delta,) = graft.attach(model, "bone", **options).deltas.values()
    assert isinstance(delta, BoneDelta)
    randomise(delta)
    return delta


@settings(max_examples=30, deadline=None)
@given(block=st.integers(1, 4), rows=st.integers(1, 4), columns=st.integers(1, 4), share=st.sampled_from(["col", "row"]))
def test_block_by_block(block: int, rows: int, columns: int, share: str) -> None:
    """W'_ab = W_ab + W_ab D_s + D_s with s = a or b."""
    model = layer(rows * block, columns * block).double()
    delta = bone(model, block=block, share=share)
    assert delta.D.shape == ((rows if share == "col" else columns), block, block)
    wanted = model[0].weight.detach().clone()
    for a in range(rows):
        for b in range(columns):
            part = wanted[a * block : (a + 1) * block, b * block : (b + 1) * block]
            D = delta.D.detach()[a if share == "col" else b]
            part += part @ D + D
    torch.testing.assert_close(delta.weight()[0], wanted)


@given(out=st.integers(1, 40), width=st.integers(1, 40), block=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_the_block_is_the_largest_that_divides_both_sides(out: int, width: int, block: int) -> None:
    size = bone(layer(out, width), block=block).D.shape[-1]
    assert size == max(d for d in range(1, block + 1) if out % d == 0 and width % d == 0)


def test_a_zero_weight_leaves_the_block_alone() -> None:
    """dW_ab = D_a: what MiSS has left of it, one block under the other."""
    model, twin = layer(6, 9), layer(6, 9)
    for each in (model, twin):
        nn.init.zeros_(each[0].weight)
    delta = bone(model, block=3)
    (miss,) = graft.attach(twin, "miss", rank=3).deltas.values()
    with torch.no_grad():
        miss.D.copy_(delta.D.transpose(1, 2).transpose(0, 1).flatten(1))
    torch.testing.assert_close(delta.weight()[0], miss.weight()[0])


def test_it_is_undone_by_an_inverse_and_is_not_of_low_rank() -> None:
    """The authors unmerge by W_ab = (W'_ab - D_a) (I + D_a)^-1; dW reaches ranks that no r x out matrix of MiSS reaches."""
    model = layer(12, 12).double()
    delta = bone(model, block=4)
    adapted, W = delta.weight()[0].detach(), model[0].weight.detach()
    for a in range(3):
        D = delta.D.detach()[a]
        for b in range(3):
            rows, columns = slice(4 * a, 4 * a + 4), slice(4 * b, 4 * b + 4)
            torch.testing.assert_close((adapted[rows, columns] - D) @ torch.linalg.inv(torch.eye(4) + D), W[rows, columns])
    assert torch.linalg.matrix_rank(adapted - W) == 12


def test_equal_blocks_make_rows_and_columns_the_same() -> None:
    one, two = (bone(layer(8, 8), block=4, share=share) for share in ("col", "row"))
    with torch.no_grad():
        for delta in (one, two):
            delta.D.copy_(one.D[:1].clone().expand(2, 4, 4))
    torch.testing.assert_close(one.weight()[0], two.weight()[0])


def test_the_first_backward_moves_everything() -> None:
    for share in ("col", "row"):
        model = tiny.llama()
        adapter = graft.attach(model, "bone", block=4, share=share)
        model(**tiny.causal_batches(1)[0]).loss.backward()
        for delta in adapter.deltas.values():
            assert not delta.D.any()
            assert delta.D.grad.flatten(1).abs().sum(1).min() > 0  # every block


def test_peft_has_shared_columns_of_one_size_only(tmp_path: Path) -> None:
    import peft

    graft.attach(tiny.llama(), "bone", block=4, share="row").save(tmp_path / "row")
    assert list(json.loads((tmp_path / "row" / "adapter_config.json").read_text())) == ["graft"]
    assert math.gcd(36, 20) == 4  # so that the key projections have smaller blocks than 18
    graft.attach(tiny.llama(), "bone", block=18).save(tmp_path / "mixed")
    with pytest.warns(UserWarning, match="fan_in_fan_out"), pytest.raises(ValueError, match="divisible into"):
        peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "mixed"))
