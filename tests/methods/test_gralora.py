"""What only GraLoRA promises: every block of W has its own low-rank pair, the counts of LoRA, and k times its rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.gralora import GraLoRADelta
from tests.methods.small import Net, layer, quiet_peft, randomise


def gralora(model: nn.Module, seed: int = 1, **options: object) -> GraLoRADelta:
    (delta,) = graft.attach(model, "gralora", **options).deltas.values()
    assert isinstance(delta, GraLoRADelta)
    randomise(delta, seed)
    return delta


def definition(own: dict[str, Tensor], scale: float) -> Tensor:
    """Block by block, as the paper draws it."""
    A, B = own["A"], own["B"]
    k, part = len(A), A.shape[2] // len(A)
    rows = [
        torch.cat([B[j, i * part : (i + 1) * part].T @ A[i, :, j * part : (j + 1) * part].T for i in range(k)], 1) for j in range(k)
    ]  # fmt: skip
    return scale * (torch.cat(rows) + (own["B_h"] @ own["A_h"] if "A_h" in own else 0))


def difference(delta: GraLoRADelta) -> Tensor:
    return (delta.weight()[0] - delta.target.weight()).detach()


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 4), part=st.integers(1, 2), out=st.integers(2, 4), width=st.integers(2, 4), hybrid=st.integers(0, 3), alpha=st.floats(0.1, 9))
def test_outputs_and_gradients_equal_autograd_through_the_definition(k: int, part: int, out: int, width: int, hybrid: int, alpha: float) -> None:
    out, width, rank = k * out, k * width, k * part
    hybrid = min(hybrid, out, width)
    model = layer(out, width).double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    delta = gralora(model, rank=rank, blocks=k, hybrid_rank=hybrid, alpha=alpha)
    assert len(delta.A) == k
    own = {name: value.detach().clone().requires_grad_(True) for name, value in delta.named_parameters()}
    x = torch.randn(5, width, dtype=torch.float64)
    expected = F.linear(x, W + definition(own, alpha / (rank + hybrid)), b)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    for (name, parameter), gradient in zip(delta.named_parameters(), torch.autograd.grad(expected.square().sum(), list(own.values())), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


@quiet_peft
def test_peft_s_own_weight_is_the_same() -> None:
    """Beside its forward, which the conformance suite compares, its way to merge."""
    import peft

    delta = gralora(layer(12, 18), rank=6, blocks=3, hybrid_rank=2, alpha=4.0)
    config = peft.GraloraConfig(target_modules=["maps.0"], r=6, gralora_k=3, hybrid_r=2, alpha=4)
    theirs = peft.get_peft_model(layer(12, 18), config).base_model.model.maps[0]
    with torch.no_grad():
        theirs.gralora_A["default"].copy_(delta.A)
        theirs.gralora_B["default"].copy_(delta.B)
        theirs.gralora_A_general["default"].weight.copy_(delta.A_h)
        theirs.gralora_B_general["default"].weight.copy_(delta.B_h)
    torch.testing.assert_close(difference(delta), theirs.get_delta_weight("default").detach())


def test_a_block_s_gradient_comes_from_its_own_inputs() -> None:
    """Inputs of one part leave the factors of the others alone: what the blocks are for."""
    model = layer(12, 18)
    delta = gralora(model, rank=6, blocks=3)
    x = torch.zeros(4, 18)
    x[:, 6:12] = torch.randn(4, 6)
    model(x).square().sum().backward()
    assert [bool(gradient.any()) for gradient in delta.A.grad] == [False, True, False]
    moved = delta.B.grad.view(3, 3, 2, 4).any(-1).any(-1)  # output block j, input block i
    assert torch.equal(moved, torch.tensor([[False, True, False]] * 3))


def test_the_rank_is_k_times_that_of_lora() -> None:
    delta = gralora(layer(24, 36).double(), rank=4, blocks=4)
    assert torch.linalg.matrix_rank(difference(delta)) == 16
    assert sum(p.numel() for p in delta.parameters()) == 4 * (24 + 36)
    B, A, error = graft.lora_factors(delta)
    assert (error, len(A)) == (0, 16)
    torch.testing.assert_close(B @ A, difference(delta))


@pytest.mark.parametrize("options", [{"rank": 2, "blocks": 1}, {"rank": 2, "blocks": 2, "hybrid_rank": 2}])
def test_one_block_and_the_hybrid_part_are_lora(options: dict[str, int]) -> None:
    model, twin = layer(8, 10), layer(8, 10)
    delta = gralora(model, alpha=4.0, **options)
    hybrid = bool(options.get("hybrid_rank"))
    (lora,) = graft.attach(twin, "lora", rank=2, alpha=2.0 if hybrid else 4.0).deltas.values()
    with torch.no_grad():
        if hybrid:
            delta.B.zero_()
        lora.A.copy_(delta.A_h if hybrid else delta.A[0].T)
        lora.B.copy_(delta.B_h if hybrid else delta.B[0].T)
    x = torch.randn(4, 10)
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize(("out", "width", "rank", "blocks", "k"), [(12, 18, 12, 5, 3), (12, 18, 4, 4, 2), (7, 9, 4, 4, 1), (16, 8, 8, 8, 8)])
def test_blocks_divide_both_sides_and_the_rank(out: int, width: int, rank: int, blocks: int, k: int) -> None:
    assert len(gralora(layer(out, width), rank=rank, blocks=blocks).A) == k


def test_starts() -> None:
    (delta,) = graft.attach(layer(60, 400), "gralora", rank=40, blocks=4, hybrid_rank=30).deltas.values()
    assert not delta.B.any()
    assert not delta.B_h.any()
    assert 0.95 / 10 < delta.A.abs().max() <= 1 / 10
    assert 0.95 / 20 < delta.A_h.abs().max() <= 1 / 20
    assert not torch.equal(delta.A[0], delta.A[1])


@quiet_peft
def test_peft_refuses_a_file_that_it_cannot_have(tmp_path: Path) -> None:
    """Where k differs between targets PEFT says so; it never computes something else."""
    import peft

    def make() -> Net:
        torch.manual_seed(0)
        return Net(nn.Linear(12, 16), nn.Linear(16, 9), nn.Linear(9, 15)).eval()

    adapter = graft.attach(make(), "gralora", rank=6, blocks=2, targets="all")
    assert [delta.layout["blocks"] for delta in adapter.deltas.values()] == [2, 1, 1]
    adapter.save(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|divisible"):
        peft.PeftModel.from_pretrained(make(), str(tmp_path))
