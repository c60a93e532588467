"""What only LoRA-GA promises: the first step moves the weight along the full gradient's leading directions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.methods.families.factored import LowRank
from tests import tiny

Batch = dict[str, Tensor]
RANK = 3
DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"]


def dense_gradients(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """The mean over batches of autograd's gradient of every weight, in a dense trainable copy."""
    twin = copy.deepcopy(model).requires_grad_(True)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        twin.zero_grad()
        twin(**batch).loss.backward()
        for name, p in twin.named_parameters():
            sums[name.removesuffix(".weight")] = sums.get(name.removesuffix(".weight"), 0) + p.grad.double() / len(batches)
    return sums


def start(**options: object) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    model, batches = tiny.llama(), tiny.causal_batches(3)
    gradients = dense_gradients(model, batches)
    adapter = graft.attach(model, "lora-ga", **{"rank": RANK, "calibration": batches, **options})
    return dict(adapter.deltas), gradients  # type: ignore[arg-type]


def units(delta: LowRank) -> tuple[Tensor, Tensor]:
    """B and A with columns and rows of length one."""
    A, B = delta.A.detach().double(), delta.B.detach().double()
    return B / B.norm(dim=0), A / A.norm(dim=1, keepdim=True)


def truncated(G: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_two_projections_of_the_gradient_are_its_best_approximation_of_rank_2r(direction: str) -> None:
    """B B^T G + G A^T A = truncated SVD of rank 2 r of autograd's G, for every disjoint choice of directions."""
    deltas, gradients = start(direction=direction)
    for name, delta in deltas.items():
        B, A = units(delta)
        G = gradients[name]
        wanted = truncated(G, 2 * RANK)
        assert (B @ B.T @ G + G @ A.T @ A - wanted).norm() < 1e-3 * wanted.norm()


def test_which_half_goes_where() -> None:
    """ArB2r: A the first r directions, B the next r; A2rBr the other way; ArBr: odd to A, even to B."""
    wanted = {"ArB2r": ([0, 1, 2], [3, 4, 5]), "A2rBr": ([3, 4, 5], [0, 1, 2]), "ArBr": ([1, 3, 5], [0, 2, 4])}
    for direction, (for_A, for_B) in wanted.items():
        deltas, gradients = start(direction=direction)
        for name, delta in deltas.items():
            U, _, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
            B, A = units(delta)
            torch.testing.assert_close((A * Vh[for_A]).sum(1).abs(), torch.ones(RANK).double(), atol=1e-3, rtol=0)
            torch.testing.assert_close((B * U[:, for_B]).sum(0).abs(), torch.ones(RANK).double(), atol=1e-3, rtol=0)


def test_random_halves_depend_on_the_seed() -> None:
    first, again, other = (start(direction="random", seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(d.A, again[n].A) for n, d in first.items())
    assert not all(torch.allclose(d.A, other[n].A) for n, d in first.items())


@pytest.mark.parametrize("gamma", [16.0, 64.0])
def test_the_stable_scale(gamma: float) -> None:
    """A A^T = B^T B = z^2 I with z = out^(1/4) / sqrt(gamma), out for both factors."""
    for delta in start(gamma=gamma)[0].values():
        square = torch.eye(RANK) * math.sqrt(delta.target.shape[0]) / gamma
        torch.testing.assert_close(delta.A @ delta.A.T, square, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(delta.B.T @ delta.B, square, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["unit", "gd", "weightS"])
def test_the_other_scales(kind: str) -> None:
    """unit: 1; gd: 1 / s; weightS: the mean of sqrt(sigma_i(W) / s) over the first r singular values of W."""
    for delta in start(start_scale=kind, alpha=5.0, rslora=True)[0].values():
        s = 5 / math.sqrt(RANK)
        assert delta.scale == pytest.approx(s)
        sigma = torch.linalg.svdvals(delta.target.weight())[:RANK]
        size = {"unit": 1.0, "gd": 1 / s, "weightS": (sigma / s).sqrt().mean().item()}[kind]
        for lengths in (delta.A.norm(dim=1), delta.B.norm(dim=0)):
            torch.testing.assert_close(lengths.detach(), torch.full((RANK,), size), atol=1e-5, rtol=1e-4)


def test_clipping_shrinks_both_factors_alike_to_the_weights_size() -> None:
    """max |s B0 A0| = max |W| where it was larger; where it was smaller nothing happens."""
    free, clipped = (start(start_scale="unit", alpha=40.0, clip=clip)[0] for clip in (False, True))
    for name, delta in free.items():
        largest, W = (delta.scale * delta.B @ delta.A).abs().max(), delta.target.weight().abs().max()
        assert largest > W
        shrunk = clipped[name]
        torch.testing.assert_close((shrunk.scale * shrunk.B @ shrunk.A).abs().max(), W, rtol=1e-4, atol=0)
        root = (W / largest).sqrt()
        torch.testing.assert_close(shrunk.A, delta.A * root, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(shrunk.B, delta.B * root, rtol=1e-4, atol=1e-6)
    small, same = (start(gamma=1e6, clip=clip)[0] for clip in (False, True))
    assert all(torch.equal(delta.A, same[name].A) for name, delta in small.items())


def test_the_size_of_the_loss_does_not_matter() -> None:
    """Only singular vectors are used, and their signs are fixed."""
    plain, large = start()[0], start(loss=lambda model, batch: 1000 * model(**batch).loss)[0]
    for name, delta in plain.items():
        torch.testing.assert_close(large[name].A, delta.A, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(large[name].B, delta.B, atol=1e-3, rtol=1e-3)


def test_the_order_of_batches_does_not_matter_and_each_counts() -> None:
    batches = tiny.causal_batches(3)
    plain, turned, fewer = (start(calibration=given)[0] for given in (batches, batches[::-1], batches[:1]))
    for name, delta in plain.items():
        torch.testing.assert_close(turned[name].A, delta.A, atol=1e-3, rtol=1e-3)
    assert not all(torch.allclose(fewer[name].A, delta.A, atol=1e-2) for name, delta in plain.items())


def test_the_first_step_points_along_the_full_gradient() -> None:
    """One plain SGD step on (A, B): dW = -lr s^2 z^2 (truncated G), closer to -G than a random A with B = 0 gets."""
    model, batches = tiny.llama(), tiny.causal_batches(3)
    gradients = dense_gradients(model, batches)
    cosines: dict[str, list[float]] = {}
    for method, options in (("lora-ga", {"calibration": batches}), ("lora", {"rslora": True, "alpha": 16.0})):
        model = tiny.llama()
        adapter = graft.attach(model, method, rank=RANK, **options)
        before = {name: delta.weight()[0].detach() for name, delta in adapter.deltas.items()}
        lr = 1e-2
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        adapter.bind(torch.optim.SGD(adapter.parameters(), lr=lr), 1).step()
        cosines[method] = []
        for name, delta in adapter.deltas.items():
            step, G = (delta.weight()[0].detach() - before[name]).double(), gradients[name]
            cosines[method].append(float(-(step * G).sum() / step.norm() / G.norm()))
            if method == "lora-ga":
                wanted = -lr * delta.scale**2 * math.sqrt(len(G)) / 64 * truncated(G, 2 * RANK)
                assert (step - wanted).norm() < 0.1 * wanted.norm()
                best = truncated(G, 2 * RANK).norm() / G.norm()
                assert cosines[method][-1] == pytest.approx(best.item(), abs=0.02)
    assert all(ours > 1.2 * plain for ours, plain in zip(cosines["lora-ga"], cosines["lora"], strict=True))


def test_it_is_a_lora_of_twice_the_rank_against_the_original_weight() -> None:
    """dW = s [B | B0] [A ; -A0] after training, with the frozen start and the scale unchanged."""
    model, batches = tiny.llama(), tiny.causal_batches()
    adapter = graft.attach(model, "lora-ga", rank=RANK, calibration=batches)
    starts = {n: (d.A.detach().clone(), d.B.detach().clone(), d.scale) for n, d in adapter.deltas.items()}
    tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=3), batches, 3)
    for name, delta in adapter.deltas.items():
        A0, B0, s = starts[name]
        assert not torch.equal(delta.A, A0)
        dW = s * (delta.B @ delta.A - B0 @ A0)
        torch.testing.assert_close(delta.weight()[0], delta.target.weight() + dW, atol=1e-5, rtol=1e-4)
        B, A, error = graft.lora_factors(delta)
        assert (B.shape[1], len(A), error) == (2 * RANK, 2 * RANK, 0.0)
        torch.testing.assert_close(B @ A, dW, atol=1e-5, rtol=1e-4)


def test_more_directions_than_there_are_is_refused() -> None:
    """20 x 36 has room for rank 10."""
    model = tiny.llama()
    with pytest.raises(graft.GraftError, match="choose rank 10 or less"):
        graft.attach(model, "lora-ga", targets="k", rank=11, calibration=tiny.causal_batches(1))
    assert not graft.adapters_of(model)
    graft.attach(model, "lora-ga", targets="k", rank=10, calibration=tiny.causal_batches(1))
