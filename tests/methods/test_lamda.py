"""What only LaMDA and LaMDA++ promise: the spectral start, columns of B that really freeze, and ranks from the spectra."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.methods.deltas.lamda import Freezing, LaMDADelta
from tests import tiny
from tests.methods.small import Net, conv, layer, randomise


def lamda(model: nn.Module, steps: int = 16, **options: object) -> tuple[graft.Adapter, LaMDADelta, torch.optim.Optimizer]:
    adapter = graft.attach(model, "lamda", **{"rank": 4, "eta": 0.5, **options})
    delta = next(iter(adapter.deltas.values()))
    assert isinstance(delta, LaMDADelta)
    return adapter, delta, adapter.optimizer(lr=0.01, total_steps=steps, weight_decay=0.1)


def state_size(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.numel() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.ndim)


@pytest.mark.parametrize("make", [layer, conv])
def test_the_spectral_start_is_the_base_and_the_weight_the_closed_form(make: object) -> None:
    """W' = W + s (B N V_r^T - U_r S_r V_r^T)."""
    model = make().double()  # type: ignore[operator]
    _, delta, _ = lamda(model, alpha=6.0)
    W = model[0].weight.detach().flatten(1)
    assert torch.equal(delta.weight()[0], W)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    leading = (U[:, :4] * S[:4]) @ V[:4]
    torch.testing.assert_close(delta.B.detach() @ delta.A, leading)
    torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(delta.B.detach().norm(dim=0), S[:4])  # the largest first, which is the order of freezing
    assert torch.equal(delta.N.detach(), torch.eye(4, dtype=torch.float64))
    randomise(delta)
    torch.testing.assert_close(delta.weight()[0].detach(), W + 1.5 * (delta.B @ delta.N @ delta.A - leading).detach())


@pytest.mark.parametrize(("eta", "steps", "expected"), [
    (0.5, 16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4]),
    (0.3, 10, [0, 1, 2, 4, 4]),
    (0.0, 10, [4, 4]),
    (0.7, 10, [0, 0, 1, 1, 2, 2, 3, 4, 4]),
    (1.0, 2, [0, 2, 4]),
    (100.0, 10, [0] * 11),
])  # fmt: skip
def test_the_schedule(eta: float, steps: int, expected: list[int]) -> None:
    """floor(4 t / (eta T)), at most 4."""
    adapter, _, _ = lamda(layer(), steps, eta=eta)
    (callback,) = adapter.callbacks
    assert isinstance(callback, Freezing)
    assert [callback.frozen(t, 4) for t in range(len(expected))] == expected


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_frozen_column_keeps_its_bits_and_the_others_move(optimizer: str) -> None:
    """Momentum and weight decay included; its gradient is zero before the step, where gradients are clipped; micro-batches do not count."""
    model = layer()
    adapter, delta, own = lamda(model)
    if optimizer == "sgd":
        own = adapter.bind(torch.optim.SGD(adapter.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1), total_steps=16)
    A = delta.A.clone()
    x = torch.randn(5, 9)
    model.train()
    for t in range(12):
        frozen = min(4, t // 2)
        before, N = delta.B.detach().clone(), delta.N.detach().clone()
        for _ in range(2):
            model(x).square().sum().backward()
        assert (delta.B.grad is None) == (frozen == 4)
        if delta.B.grad is not None:
            assert not delta.B.grad[:, :frozen].any()
            assert delta.B.grad[:, frozen:].abs().min() > 0
        own.step()
        assert (delta.B.grad is None) == (t >= 7)  # a loop that never clears gradients would apply the last one again
        own.zero_grad()
        assert torch.equal(delta.B[:, :frozen], before[:, :frozen]), t
        assert not torch.any(delta.B[:, frozen:] == before[:, frozen:]), t
        assert not torch.equal(delta.N, N)
        for moments in own.state[delta.B].values() if delta.B in own.state else ():
            if isinstance(moments, Tensor) and moments.ndim:
                assert not moments[:, : min(4, (t + 1) // 2)].any()
                assert moments[:, min(4, (t + 1) // 2) :].abs().min() > 0
    assert torch.equal(delta.A, A)


def test_after_the_last_column_the_core_alone_has_gradients_and_state() -> None:
    model = tiny.llama()
    adapter, _, optimizer = lamda(model, steps=6)
    targets = len(adapter.deltas)
    outputs = sum(delta.target.shape[0] for delta in adapter.deltas.values())
    batches, sizes = tiny.causal_batches(5), []
    for batch in batches:
        tiny.train(model, optimizer, [batch], 1)
        sizes.append(state_size(optimizer))
    assert sizes[0] == 2 * targets * 16 + 2 * 4 * outputs
    assert sizes[2:] == [2 * targets * 16] * 3  # two moments of N [4, 4]
    model.train()
    model(**batches[0]).loss.backward()
    for delta in adapter.deltas.values():
        assert delta.N.grad.any()
        assert delta.B.grad is None
        assert not delta.B.requires_grad


def test_without_a_phase_of_b_it_is_the_core_alone() -> None:
    """eta = 0: torch's AdamW on N between the frozen singular vectors."""
    model = layer().double()
    _, delta, optimizer = lamda(model, eta=0.0)
    W, bias = model[0].weight.detach(), model[0].bias.detach()
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    N = nn.Parameter(torch.eye(4, dtype=torch.float64))
    plain = torch.optim.AdamW([N], lr=0.01, weight_decay=0.1)
    signs = torch.sign((V[:4] * delta.A).sum(1))
    B, A = U[:, :4] * S[:4] * signs, signs[:, None] * V[:4]
    model.train()
    for _ in range(4):
        x = torch.randn(5, 9, dtype=torch.float64)
        model(x).square().sum().backward()
        (x @ (W + B @ (N - torch.eye(4).double()) @ A).T + bias).square().sum().backward()
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
    torch.testing.assert_close(delta.N, N)
    torch.testing.assert_close(delta.B.detach(), B)


def test_with_b_always_free_and_a_random_start_it_is_slora_with_a_frozen() -> None:
    ends = []
    for method, options in (("lamda", {"eta": 100.0, "spectral": False}), ("slora", {})):
        model = tiny.llama()
        adapter = graft.attach(model, method, rank=3, seed=4, **options)
        if method == "slora":
            for delta in adapter.deltas.values():
                delta.A.requires_grad_(False)
        tiny.train(model, adapter.optimizer(lr=0.01, total_steps=5, weight_decay=0.1), tiny.causal_batches(), 5)
        ends.append({name: (delta.B.detach(), delta.N.detach()) for name, delta in adapter.deltas.items()})
    for name, (B, N) in ends[0].items():
        assert B.any()
        torch.testing.assert_close(B, ends[1][name][0])
        torch.testing.assert_close(N, ends[1][name][1])


@pytest.mark.parametrize("options", [{}, {"spectral": False}, {"save_bases": True}])
def test_files_of_either_start_mean_the_same(options: dict[str, bool], tmp_path: Path) -> None:
    model = layer()
    adapter, delta, _ = lamda(model, **options)
    randomise(delta)
    (loaded,) = graft.load_adapter(layer(), adapter.save(tmp_path)).deltas.values()
    torch.testing.assert_close(loaded.weight()[0], delta.weight()[0])
    assert hasattr(delta, "B0") == hasattr(loaded, "B0") == ("spectral" not in options)  # a start at zero needs no copy
    assert ("signature" in delta.exported()) != ("save_bases" in options)


def test_distributed_data_parallel_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = layer()
        lamda(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(graft.GraftError, match=r"LaMDA freezes B during training, a change that DistributedDataParallel does not know"):
            wrapped.train()(torch.randn(3, 9))
    finally:
        torch.distributed.destroy_process_group()


def with_spectrum(exponent: float, seed: int) -> nn.Linear:
    """A map whose singular values fall as i^-exponent: the larger, the more peaked."""
    torch.manual_seed(seed)
    linear = nn.Linear(20, 20)
    U, V = (torch.linalg.qr(torch.randn(20, 20)).Q for _ in range(2))
    with torch.no_grad():
        linear.weight.copy_((U * torch.arange(1.0, 21) ** -exponent) @ V)
    return linear


@pytest.mark.parametrize(("spread", "expected"), [(0.5, [2, 2, 4, 4, 4, 6, 6]), (0.25, [3, 3, 4, 4, 4, 5, 5]), (0.0, [4] * 7)])
def test_flat_spectra_get_more_rank_and_the_mean_is_the_budget(spread: float, expected: list[int]) -> None:
    exponents = [0.5, 3.0, 0.0, 1.0, 2.0, 0.2, 1.5]
    adapter = graft.attach(Net(*(with_spectrum(e, i) for i, e in enumerate(exponents))), "lamda++", targets="all", rank=4, spread=spread)
    ranks = [delta.layout["rank"] for delta in adapter.deltas.values()]
    by_peak = sorted(zip(exponents, ranks, strict=True), reverse=True)
    assert [rank for _, rank in by_peak] == expected
    assert sum(ranks) == 4 * 7


def test_scale_and_frozen_columns_follow_each_rank() -> None:
    adapter = graft.attach(Net(*(with_spectrum(e, 0) for e in (0.0, 1.0, 3.0))), "lamda++", targets="all", rank=4, alpha=2.0, eta=1.0)
    adapter.optimizer(lr=0.1, total_steps=4)
    (callback,) = adapter.callbacks
    adapter.step = 2
    callback.load_state_dict({})
    assert [(len(d.N), d.frozen, d.scale) for d in adapter.deltas.values()] == [(6, 3, 0.5), (4, 2, 0.5), (2, 1, 0.5)]
