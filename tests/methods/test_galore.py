"""What only GaLore promises; the authors' optimizer is the oracle."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.optimisers import galore
from graft.methods.optimisers.galore import GaLoreAdamW, projection
from graft.numerics.svd import fix_signs
from tests import tiny

SIDES = ["std", "reverse_std", "left", "right"]
RANK, INTERVAL, LR, KAPPA, DECAY = 3, 5, 0.05, 0.7, 0.1


@pytest.fixture(scope="module")
def authors() -> types.ModuleType:
    """galore_torch's AdamW, by path: the package itself imports bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    package = types.ModuleType("authors_galore")
    package.__path__ = [str(folder)]
    sys.modules["authors_galore"] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like in third-party code
        module = importlib.import_module("authors_galore.adamw")
    original = module.GaLoreProjector.get_orthogonal_matrix

    def with_our_signs(self: object, weights: Tensor, rank: int, type: str) -> Tensor:
        """Signs of singular vectors are arbitrary, but moments survive a refresh, so both sides must choose alike."""
        found = original(self, weights, rank, type)
        U, _, Vh = torch.linalg.svd(weights, full_matrices=False)
        U, Vh = fix_signs(U[:, :rank], Vh[:rank])
        ours = Vh if type == "right" else U
        dim = 1 if type == "right" else 0
        signs = (ours * found).sum(dim, keepdim=True)
        torch.testing.assert_close(signs.abs(), torch.ones_like(signs), atol=1e-4, rtol=0)  # the same directions
        return found * signs.sign()

    module.GaLoreProjector.get_orthogonal_matrix = with_our_signs
    return module


def gradients(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, all_gradients: list[Tensor]) -> list[Tensor]:
    trajectory = []
    for gradient in all_gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        trajectory.append(parameter.detach().clone())
    return trajectory


def ours(shape: tuple[int, ...], **options: object) -> tuple[GaLoreAdamW, nn.Parameter]:
    parameter = nn.Parameter(gradients(shape, 1)[0] * 0.3)
    group = {"params": [parameter], "rank": RANK, "update_interval": INTERVAL, "projection_scale": KAPPA, **options}
    return GaLoreAdamW([group], lr=LR, weight_decay=DECAY), parameter


# ---- against the authors' code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(11, 6), (6, 11), (7, 7)], ids=["tall", "wide", "square"])
def test_twelve_steps_equal_the_authors(authors: types.ModuleType, shape: tuple[int, int], side: str) -> None:
    """Over two refreshes, with decay; moments are kept as they are when the projection changes."""
    if side == "reverse_std" and shape == (7, 7):
        side = "right"  # the authors' back projection guesses the side from the shape, which a square does not tell
    optimizer, parameter = ours(shape, side=side)
    twin = nn.Parameter(parameter.detach().clone())
    group = {"params": [twin], "rank": RANK, "update_proj_gap": INTERVAL, "scale": KAPPA, "proj_type": side}
    oracle = authors.AdamW([group], lr=LR, eps=1e-6, weight_decay=DECAY, no_deprecation_warning=True)
    all_gradients = gradients(shape, 12)
    for step, (seen, wanted) in enumerate(zip(run(optimizer, parameter, all_gradients), run(oracle, twin, all_gradients), strict=True)):
        torch.testing.assert_close(seen, wanted, atol=2e-5, rtol=1e-4, msg=lambda m, step=step: f"update {step}: {m}")
    state = optimizer.state[parameter]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], oracle.state[twin][name], atol=1e-5, rtol=1e-4)


# ---- the projection -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 15), side=st.sampled_from(SIDES))
def test_the_projection_is_orthonormal_and_the_best_of_its_rank(rows: int, columns: int, rank: int, side: str) -> None:
    """On a refresh the residual of back(project(G)) is the tail of G's spectrum; a rank above the matrix is clipped."""
    G = gradients((rows, columns), 1, torch.float64)[0]
    P = projection(G, rank, side)  # type: ignore[arg-type]
    kept = min(rank, rows, columns)
    right = {"std": rows >= columns, "reverse_std": rows < columns, "left": False, "right": True}[side]
    assert P.shape == ((kept, columns) if right else (rows, kept))
    torch.testing.assert_close(P @ P.T if right else P.T @ P, torch.eye(kept, dtype=torch.float64))
    back = G @ P.T @ P if right else P @ P.T @ G
    torch.testing.assert_close((G - back).square().sum(), torch.linalg.svdvals(G)[kept:].square().sum(), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("steps", "wanted"), [(1, 1), (5, 1), (6, 2), (12, 3), (15, 3), (16, 4)])
def test_one_svd_every_interval(steps: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ceil(steps / T) for each projected weight."""
    calls = []
    monkeypatch.setattr(galore, "truncated_svd", lambda *args, f=galore.truncated_svd: calls.append(1) or f(*args))
    optimizer, parameter = ours((9, 5))
    run(optimizer, parameter, gradients((9, 5), steps))
    assert len(calls) == wanted


@pytest.mark.parametrize(("shape", "moments", "P"), [((11, 6), (11, 3), (3, 6)), ((6, 11), (3, 11), (6, 3)), ((2, 5), (2, 5), (2, 2))])
def test_state_is_of_the_projected_shape(shape: tuple[int, int], moments: tuple[int, int], P: tuple[int, int]) -> None:
    """2 m r + n r numbers in place of 2 m n, all of them tensors or numbers that a state dict can hold."""
    optimizer, parameter = ours(shape)
    run(optimizer, parameter, gradients(shape, 2))
    state = optimizer.state[parameter]
    assert tuple(state["exp_avg"].shape) == tuple(state["exp_avg_sq"].shape) == moments
    assert tuple(state["projection"].shape) == P
    assert all(isinstance(value, (Tensor, int)) for value in state.values())


def test_a_transposed_weight_gets_the_transposed_update() -> None:
    """Within one interval, where the signs of singular vectors cancel."""
    tall, wide = ours((11, 6)), ours((6, 11))
    wide[1].data = tall[1].data.T.clone()
    all_gradients = gradients((11, 6), INTERVAL)
    for a, b in zip(run(*tall, all_gradients), run(*wide, [g.T for g in all_gradients]), strict=True):
        torch.testing.assert_close(a, b.T, atol=1e-5, rtol=1e-4)


def test_updates_within_an_interval_stay_in_the_subspace() -> None:
    """And leave it at the next refresh: the sum of updates has a higher rank than one projection."""
    optimizer, parameter = ours((11, 8))
    optimizer.param_groups[0]["weight_decay"] = 0.0
    start = parameter.detach().clone()
    trajectory = run(optimizer, parameter, gradients((11, 8), 10))
    assert torch.linalg.matrix_rank(trajectory[4] - start, rtol=1e-4) == RANK
    assert torch.linalg.matrix_rank(trajectory[9] - start, rtol=1e-4) == 2 * RANK


def test_a_gradient_that_is_not_finite_does_not_kill_the_svd() -> None:
    """At the first update the weight waits; at a refresh the projection stays."""
    optimizer, parameter = ours((9, 5))
    before = parameter.detach().clone()
    bad = torch.full((9, 5), float("nan"))
    run(optimizer, parameter, [bad])
    assert torch.equal(parameter, before)
    run(optimizer, parameter, gradients((9, 5), 5))
    P = optimizer.state[parameter]["projection"].clone()
    run(optimizer, parameter, [bad])
    assert torch.equal(optimizer.state[parameter]["projection"], P)


def test_low_precision_weights_have_fp32_projections_and_moments() -> None:
    parameter = nn.Parameter(gradients((9, 5), 1, torch.bfloat16)[0])
    optimizer = GaLoreAdamW([{"params": [parameter], "rank": 3}], lr=LR)
    run(optimizer, parameter, gradients((9, 5), 3, torch.bfloat16))
    assert parameter.dtype == torch.bfloat16
    assert {v.dtype for v in optimizer.state[parameter].values() if isinstance(v, Tensor)} == {torch.float32}


# ---- other weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 4, 2), ()])
def test_weights_outside_projected_groups_get_torchs_adamw_to_the_bit(shape: tuple[int, ...], decay: float) -> None:
    parameter = nn.Parameter(gradients(shape, 1)[0])
    twin = nn.Parameter(parameter.detach().clone())
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": decay}
    all_gradients = gradients(shape, 25)
    seen = run(GaLoreAdamW([parameter], **options), parameter, all_gradients)
    for a, b in zip(seen, run(torch.optim.AdamW([twin], **options, foreach=False), twin, all_gradients), strict=True):
        assert torch.equal(a, b)


def test_vectors_in_a_projected_group_are_not_projected() -> None:
    parameter = nn.Parameter(gradients((7,), 1)[0])
    twin = nn.Parameter(parameter.detach().clone())
    optimizer = GaLoreAdamW([{"params": [parameter], "rank": 2}], lr=LR, eps=1e-6)
    seen = run(optimizer, parameter, gradients((7,), 6))
    wanted = run(torch.optim.AdamW([twin], lr=LR, eps=1e-6, weight_decay=0.0), twin, gradients((7,), 6))
    assert torch.equal(seen[-1], wanted[-1])


def test_a_closure_is_run_with_gradients() -> None:
    optimizer, parameter = ours((9, 5))
    before = parameter.detach().clone()

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(before.square().sum().item())
    assert not torch.equal(parameter, before)


# ---- on a model ---------------------------------------------------------------------------------------------------------


def trained(steps: int = 7, **options: object) -> tuple[graft.Adapter, torch.optim.Optimizer]:
    model = tiny.llama()
    adapter = graft.attach(model, "galore", targets="all", **{"rank": 3, "update_interval": 3, **options})
    optimizer = adapter.optimizer(lr=1e-2, total_steps=20, weight_decay=0.01)
    tiny.train(model, optimizer, tiny.causal_batches(), steps)
    return adapter, optimizer


def test_matrices_of_the_blocks_are_projected_and_nothing_else() -> None:
    """Embedding, head and norms have plain AdamW."""
    adapter, optimizer = trained()
    for name, delta in adapter.deltas.items():
        for p in delta.parameters():
            assert ("projection" in optimizer.state[p]) == ("layers" in name and p.ndim == 2), name


def test_per_layer_equals_the_normal_mode_to_the_bit_and_keeps_no_gradients() -> None:
    normal, layered = trained()[0], trained(per_layer=True)[0]
    for a, b in zip(normal.parameters(), layered.parameters(), strict=True):
        assert torch.equal(a, b)
    layered.model(**tiny.causal_batches(1)[0]).loss.backward()
    assert all(p.grad is None for p in layered.parameters())


def test_gradients_live_for_one_weight_at_a_time() -> None:
    """The purpose of per_layer: while a backward pass runs, no other weight holds a gradient."""
    model = tiny.llama()
    adapter = graft.attach(model, "galore", rank=3, per_layer=True)
    alive: list[int] = []
    for p in adapter.parameters():  # before the optimizer's own hooks, so that each still sees its gradient
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in adapter.parameters())))
    tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=2), tiny.causal_batches(), 2)
    assert len(alive) == 2 * len(adapter.parameters())
    assert set(alive) == {1}


def test_accumulation_is_refused_in_per_layer_mode() -> None:
    """A second backward pass before step() would be a second update."""
    adapter, optimizer = trained(per_layer=True)
    batch = tiny.causal_batches(1)[0]
    adapter.model(**batch).loss.backward()
    with pytest.raises(graft.GraftError, match="accumulate"):
        adapter.model(**batch).loss.backward()
    optimizer.step()
    adapter.model(**batch).loss.backward()


def test_per_layer_is_refused_where_a_method_acts_on_gradients() -> None:
    """AdaLoRA's penalty and scores would come after the weights have moved and the gradients are gone; LISA only chooses weights."""
    for delta, callbacks in ((graft.AdaLoRA(rank=1, initial_rank=2), ()), (graft.Full(), (graft.LISA(active_blocks=1),))):
        for per_layer in (True, False):
            adapter = graft.attach(tiny.llama(), delta, callbacks=callbacks, optimiser=graft.GaLore(rank=2, per_layer=per_layer))
            if per_layer and not callbacks:
                with pytest.raises(graft.GraftError, match="per_layer=False"):
                    adapter.optimizer(lr=1e-2, total_steps=3)
            else:
                adapter.optimizer(lr=1e-2, total_steps=3)


def test_per_layer_follows_the_learning_rate_also_after_loading_a_state() -> None:
    """A resumed run's groups are other objects than those the hooks were made with."""
    adapter, optimizer = trained(per_layer=True)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in adapter.parameters()]
    tiny.train(adapter.model, optimizer, tiny.causal_batches(), 2)
    assert all(torch.equal(p, old) for p, old in zip(adapter.parameters(), before, strict=True))


def test_a_group_that_is_added_later_trains_in_per_layer_mode_too() -> None:
    first, second = (nn.Parameter(gradients((4, 3), 1)[0]) for _ in range(2))
    optimizer = GaLoreAdamW([first], lr=LR, per_layer=True)
    optimizer.add_param_group({"params": [second], "rank": 2})
    before = second.detach().clone()
    (first.sum() + second.square().sum()).backward()
    optimizer.step()
    assert not torch.equal(second, before)
    assert "projection" in optimizer.state[second]


def test_it_learns_most_of_what_adam_learns_with_far_less_state() -> None:
    """Loss of the same targets after 40 updates on one batch: at least 70% of AdamW's gain, at under 30% of its state."""
    gains = {}
    for method, options in (("full", {}), ("galore", {"rank": 3, "projection_scale": 1.0, "update_interval": 10})):
        model = tiny.llama()
        adapter = graft.attach(model, method, **options)
        optimizer = adapter.optimizer(lr=1e-2, total_steps=40)
        losses = tiny.train(model, optimizer, tiny.causal_batches(1), 40)
        gains[method] = losses[0] - losses[-1]
    assert gains["galore"] > 0.7 * gains["full"] > 0.3
    held = sum(v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    assert held < 0.3 * 2 * sum(p.numel() for p in adapter.parameters())
