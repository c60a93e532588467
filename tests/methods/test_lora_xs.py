"""What only LoRA-XS and LoRA-SB promise: a core in fixed subspaces, and a start that is the first update of full fine-tuning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.methods.families.three_factor import ThreeFactor
from tests import tiny
from tests.methods.small import layer, randomise


def one(model: nn.Module, method: str = "lora-xs", **options: object) -> ThreeFactor:
    (delta,) = graft.attach(model, method, **options).deltas.values()
    assert isinstance(delta, ThreeFactor)
    return delta


def cubes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).pow(3).mean()


def test_the_factors_are_the_leading_singular_vectors() -> None:
    model = layer().double()
    delta = one(model, rank=3)
    U, S, Vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    torch.testing.assert_close(delta.B.T @ delta.B, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(delta.A @ delta.A.T, torch.diag(S[:3].square()))
    torch.testing.assert_close(delta.B @ delta.A, U[:, :3] * S[:3] @ Vh[:3])


def test_the_core_s_gradient_is_the_full_one_between_the_factors() -> None:
    model = layer().double()
    delta = one(model, rank=3, alpha=6.0)
    randomise(delta)
    x = torch.randn(5, 9, dtype=torch.float64)
    W = delta.weight()[0].detach().requires_grad_(True)
    (x @ W.T + model[0].bias).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(delta.N.grad, 2.0 * delta.B.T @ W.grad @ delta.A.T)


def test_the_update_stays_in_the_subspaces() -> None:
    model = layer().double()
    delta = one(model, rank=3)
    randomise(delta)
    update = delta.weight()[0] - model[0].weight
    onto_A = torch.linalg.pinv(delta.A) @ delta.A
    torch.testing.assert_close(delta.B @ (delta.B.T @ update) @ onto_A, update)
    assert torch.linalg.matrix_rank(update) == 3


def test_lora_sb_starts_one_sign_step_away() -> None:
    model = layer(6, 9).double()
    batches = [{"x": torch.randn(40, 9, dtype=torch.float64)}]
    batch = {"input": batches[0]["x"]}
    W = model[0].weight.detach().clone().requires_grad_(True)
    (batch["input"] @ W.T + model[0].bias).pow(3).mean().backward()
    for rank in (2, 6):
        (delta,) = graft.attach(model, "lora-sb", rank=rank, first_step=1e-3, calibration=batches, loss=cubes).deltas.values()
        start = delta.weight()[0].detach() - model[0].weight.detach()
        U, S, Vh = torch.linalg.svd(-1e-3 * W.grad.sign())
        torch.testing.assert_close(start, (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(rank, dtype=torch.float64))
        graft.detach(model)
    torch.testing.assert_close(start, -1e-3 * W.grad.sign())  # all ranks: the whole step


def test_a_step_of_lora_sb_is_the_full_step_projected() -> None:
    model = layer().double()
    (delta,) = graft.attach(model, "lora-sb", rank=3, calibration=[{"x": torch.randn(9, 9, dtype=torch.float64)}], loss=cubes).deltas.values()
    x = torch.randn(5, 9, dtype=torch.float64)
    W = delta.weight()[0].detach().requires_grad_(True)
    (x @ W.T + model[0].bias).square().sum().backward()
    before = delta.weight()[0].detach()
    model(x).square().sum().backward()
    torch.optim.SGD([delta.N], lr=0.01).step()
    projected = delta.B @ delta.B.T @ W.grad @ delta.A.T @ delta.A
    torch.testing.assert_close(delta.weight()[0], before - 0.01 * projected)


def test_the_start_of_lora_sb_lowers_the_loss() -> None:
    model, batches = tiny.llama(), tiny.causal_batches(2)
    before = sum(model(**batch).loss.item() for batch in batches)
    graft.attach(model, "lora-sb", rank=8, first_step=1e-3, calibration=batches)
    assert sum(model(**batch).loss.item() for batch in batches) < before


@pytest.mark.parametrize("delta", ["lora", "lora-xs"])
def test_lora_sb_needs_factors_that_files_hold(delta: str) -> None:
    from graft.methods.init.lora_sb import LoRASB

    model = layer()
    with pytest.raises(graft.GraftError, match="save_bases=True"):
        graft.attach(model, delta, rank=2, init=LoRASB(), calibration=[{"x": torch.randn(4, 9)}], loss=cubes)
    assert graft.adapters_of(model) == {}
