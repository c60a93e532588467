"""What only AdaLoRA promises: the budget, the scores and the cuts; PEFT's RankAllocator is the oracle."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.allocation.adalora import AdaLoRADelta, Budget
from tests import tiny
from tests.methods.small import Net, randomise

SHAPES = [(7, 9), (8, 7), (6, 8)]


def stack(seed: int = 0) -> Net:
    """Three maps of different shapes, one behind the other: 9 -> 7 -> 8 -> 6 takes 9 inputs."""
    torch.manual_seed(seed)
    return Net(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6))


def bound(total: int, model: nn.Module | None = None, lr: float = 1e-2, **options: object) -> tuple[graft.Adapter, Budget, torch.optim.Optimizer]:
    adapter = graft.attach(model or stack(), "adalora", **{"rank": 2, "initial_rank": 4, **options})
    optimizer = adapter.optimizer(lr=lr, total_steps=total)
    (budget,) = adapter.callbacks
    assert isinstance(budget, Budget)
    return adapter, budget, optimizer


def alive(adapter: graft.Adapter) -> int:
    return sum(int((delta.E != 0).sum()) for delta in adapter.deltas.values())


def learn(adapter: graft.Adapter, optimizer: torch.optim.Optimizer, steps: int, each=lambda t: None, seed: int = 5) -> None:
    """A regression with random targets; ``each`` runs after every update with t, the number of finished ones."""
    generator = torch.Generator().manual_seed(seed)
    adapter.model.train()
    for step in range(steps):
        x, y = torch.randn(16, 9, generator=generator), torch.randn(16, 6, generator=generator)
        (adapter.model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        each(step + 1)


# ---- the budget ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 0.95),
    final=st.floats(0, 0.95),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_the_schedule_is_cubic_and_falls_from_all_to_the_target(total: int, warmup: float, final: float, ranks: tuple[int, int]) -> None:
    if warmup + final > 0.98:
        warmup, final = warmup / 2, final / 2
    rank, initial = sorted(ranks)
    _, budget, _ = bound(total, rank=rank, initial_rank=initial, warmup=warmup, final=final)
    first, last = int(warmup * total), total - int(final * total)
    seen = [budget.budget(t) for t in range(total + 1)]
    b0, bT = 3 * initial, 3 * rank
    for t, value in enumerate(seen):
        wanted = b0 if t <= first else bT if t >= last else bT + (b0 - bT) * (1 - (t - first) / (last - first)) ** 3
        assert abs(value - wanted) <= 0.5 + 1e-9
    assert seen[first] == b0
    assert seen[last] == bT
    assert seen == sorted(seen, reverse=True)


def test_every_cut_leaves_exactly_the_budget() -> None:
    """Cuts come at multiples of the interval; between them pruned triplets may come back; the last mask stays for good."""
    adapter, budget, optimizer = bound(60, interval=7, warmup=0.1, final=0.3)
    first, last = budget.phases
    assert (first, last) == (6, 42)
    counts: dict[int, int] = {}
    masks: dict[int, list[list[bool]]] = {}

    def look(t: int) -> None:
        counts[t] = alive(adapter)
        masks[t] = [(d.E[:, 0] != 0).tolist() for d in adapter.deltas.values()]

    learn(adapter, optimizer, 60, look)
    assert all(counts[t] == 12 for t in range(1, 7))
    for t in (7, 14, 21, 28, 35, 42):
        assert counts[t] == budget.budget(t)
    assert max(counts[t] for t in range(15, 21)) > budget.budget(14)  # masked E still learns
    assert [budget.budget(t) for t in (7, 14, 42)] == [12, 9, 6]
    assert all(masks[t] == masks[42] for t in range(42, 61))
    assert counts[60] == 6


def test_with_rank_equal_to_the_initial_rank_nothing_is_cut() -> None:
    adapter, _, optimizer = bound(20, rank=4, interval=1)
    learn(adapter, optimizer, 20, lambda t: None)
    assert alive(adapter) == 12


def test_equal_scores_do_not_cut_everything() -> None:
    """Without any gradient all scores are 0, and a threshold of 0 would prune every triplet."""
    adapter, budget, optimizer = bound(10, interval=1, warmup=0.0, orthogonality=0.0)
    for delta in adapter.deltas.values():
        nn.init.ones_(delta.E)
    for t in range(1, 11):
        optimizer.step()
        assert alive(adapter) == budget.budget(t)


def test_training_on_beyond_the_end_keeps_to_the_target() -> None:
    """Bound anew with fewer steps than are done already, the final phase starts at once."""
    adapter, _, optimizer = bound(100, interval=10)
    learn(adapter, optimizer, 8)
    assert alive(adapter) == 12
    optimizer = adapter.optimizer(lr=1e-2, total_steps=10)
    learn(adapter, optimizer, 3, lambda t: None)
    assert alive(adapter) == 6


# ---- scores -------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A target's tensors under the names that PEFT gives them."""

    def __init__(self, delta: AdaLoRADelta):
        super().__init__()
        for key in ("A", "B", "E"):
            setattr(self, f"lora_{key}", nn.ParameterDict({"default": nn.Parameter(getattr(delta, key).detach().clone())}))

    def sync(self, delta: AdaLoRADelta) -> None:
        for key in ("A", "B", "E"):
            own = getattr(self, f"lora_{key}")["default"]
            own.data, own.grad = getattr(delta, key).detach().clone(), getattr(delta, key).grad.clone()


def test_scores_and_cuts_equal_pefts_allocator() -> None:
    """The same weights and gradients go to both at every update: smoothed sensitivity, uncertainty and the masks agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's imports warn about their own dependencies
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

    adapter, budget, optimizer = bound(40, interval=3, warmup=0.1, final=0.25, beta1=0.8, beta2=0.7)
    holders = nn.ModuleList(Holder(delta) for delta in adapter.deltas.values())
    first, last = budget.phases
    oracle = RankAllocator(
        holders, AdaLoraConfig(target_r=2, init_r=4, tinit=first, tfinal=40 - last, deltaT=3, beta1=0.8, beta2=0.7, total_step=40), "default"
    )
    compared = []
    observe = budget.after_update

    def both(step: int) -> None:
        for holder, delta in zip(holders, adapter.deltas.values(), strict=True):
            holder.sync(delta)
        t = step + 1
        observe(step)
        if t >= last:
            return
        wanted, cut = oracle.budget_schedule(t)
        oracle.update_ipt(holders)
        for index, name in enumerate(adapter.deltas):
            for key in ("A", "B", "E"):
                torch.testing.assert_close(budget.averages[f"{name}.{key}.I"], oracle.exp_avg_ipt[f"{index}.lora_{key}.default"])
                torch.testing.assert_close(budget.averages[f"{name}.{key}.U"], oracle.exp_avg_unc[f"{index}.lora_{key}.default"])
        if cut and wanted == budget.budget(t):  # PEFT rounds the budget down
            oracle.mask_to_budget(holders, wanted)
            for holder, delta in zip(holders, adapter.deltas.values(), strict=True):
                assert torch.equal(holder.lora_E["default"], delta.E)
            compared.append(wanted)

    budget.after_update = both  # type: ignore[method-assign]
    learn(adapter, optimizer, 40)
    assert len(set(compared)) >= 3


def test_sensitivity_without_gradient_decays_as_a_power() -> None:
    """Ibar falls by b1 with every update; so a triplet that is no longer used loses its score."""
    adapter, budget, optimizer = bound(100, beta1=0.8, orthogonality=0.0, warmup=0.9, final=0.05)
    learn(adapter, optimizer, 3)
    before = {name: value.clone() for name, value in budget.averages.items() if name.endswith(".I")}
    for _ in range(5):
        optimizer.step()  # every .grad is None
    for name, value in before.items():
        torch.testing.assert_close(budget.averages[name], value * 0.8**5)
        assert value.any()


def test_sensitivity_is_taken_once_an_update_with_the_whole_gradient() -> None:
    """Two micro-batches are one observation of |w dL/dw|, as one batch of both would be."""
    seen = []
    for parts in (1, 2):
        adapter, budget, optimizer = bound(50, orthogonality=0.0)
        x, y = torch.randn(8, 9, generator=torch.Generator().manual_seed(0)), torch.ones(8, 6)
        adapter.model.train()
        for _ in range(3):
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                ((adapter.model(xs) - ys).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert adapter.step == 3
        seen.append({n: v.clone() for n, v in budget.averages.items()})
    for name, value in seen[0].items():
        torch.testing.assert_close(seen[1][name], value, atol=1e-7, rtol=1e-3)


# ---- the penalty --------------------------------------------------------------------------------------------------------


def by_torch(adapter: graft.Adapter, gamma: float) -> Tensor:
    """gamma * mean of ||A A^T - I|| and ||B^T B - I||, as PEFT's AdaLoraModel writes it."""
    norms = []
    for d in adapter.deltas.values():
        norms += [torch.norm(d.A @ d.A.T - torch.eye(len(d.A)), p="fro"), torch.norm(d.B.T @ d.B - torch.eye(len(d.A)), p="fro")]
    return gamma * torch.stack(norms).mean()


def test_the_penalty_is_the_mean_distance_from_orthogonality() -> None:
    adapter, budget, _ = bound(10, orthogonality=0.3)
    for seed, delta in enumerate(adapter.deltas.values()):
        randomise(delta, seed)
    torch.testing.assert_close(budget.penalty(), by_torch(adapter, 0.3))


def test_the_penalty_has_no_gradient_at_orthogonal_factors() -> None:
    """A plain norm has the gradient NaN there."""
    adapter, budget, _ = bound(10, model=stack().double())
    for delta in adapter.deltas.values():
        randomise(delta)
        delta.A.data, delta.B.data = torch.linalg.qr(delta.A.data.T).Q.T.contiguous(), torch.linalg.qr(delta.B.data).Q
    penalty = budget.penalty()
    assert penalty is not None
    factors = [p for d in adapter.deltas.values() for p in (d.A, d.B)]
    for gradient in torch.autograd.grad(penalty, factors):
        assert gradient.abs().max() < 1e-12
    for delta in adapter.deltas.values():
        delta.A.data = torch.eye(4, 9)[:, : delta.A.shape[1]].double()
        delta.B.data = torch.eye(delta.B.shape[0], 4).double()
    for gradient in torch.autograd.grad(budget.penalty(), factors):  # type: ignore[arg-type]
        assert not gradient.any()  # exactly zero, not 0 / 0


@pytest.mark.parametrize("parts", [1, 3])
def test_an_update_descends_loss_and_penalty_once(parts: int) -> None:
    """Plain SGD: w <- w - lr (dL/dw + d penalty/dw), the penalty once however many micro-batches there were."""
    adapter = graft.attach(stack(), "adalora", rank=2, initial_rank=4, orthogonality=0.3)
    for seed, delta in enumerate(adapter.deltas.values()):
        randomise(delta, seed)
    before = [p.detach().clone() for p in adapter.parameters()]
    optimizer = adapter.bind(torch.optim.SGD(adapter.parameters(), lr=0.1), 100)
    x = torch.randn(6, 9)
    adapter.model.train()
    for chunk in x.chunk(parts):
        (adapter.model(chunk).square().sum()).backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    penalties = torch.autograd.grad(by_torch(adapter, 0.3), adapter.parameters(), allow_unused=True)
    optimizer.step()
    for p, old, gradient, extra in zip(adapter.parameters(), before, gradients, penalties, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * (gradient + (0 if extra is None else extra)))


# ---- the delta ----------------------------------------------------------------------------------------------------------


def test_start_and_scale() -> None:
    """A, B ~ N(0, 0.02^2), E = 0; the scale is alpha over the initial rank, whatever is left at the end."""
    adapter = graft.attach(Net(nn.Linear(400, 300)), "adalora", rank=2, initial_rank=40, alpha=32)
    (delta,) = adapter.deltas.values()
    assert not delta.E.any()
    for factor in (delta.A, delta.B):
        assert abs(factor.std() / 0.02 - 1) < 0.02
        assert abs(factor.mean()) < 0.001
    randomise(delta)
    with torch.no_grad():
        delta.E[3:] = 0
    B, A, E = delta.B.detach(), delta.A.detach(), delta.E.detach()[:, 0]
    wanted = 32 / (40 + 1e-5) * sum(E[i] * torch.outer(B[:, i], A[i]) for i in range(3))
    torch.testing.assert_close((delta.weight()[0] - delta.target.weight()).detach(), wanted, atol=1e-4, rtol=1e-4)


def test_the_budget_goes_where_teacher_and_student_differ() -> None:
    """Residual maps, of which the teacher differs in 2 of 8: most of the ranks that are left lie there."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.maps = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for each in self.maps:
                x = x + each(x).tanh()
            return x

    teacher, student = Residual(), Residual()
    changed = (1, 5)
    with torch.no_grad():
        for index in changed:
            teacher.maps[index].weight.add_(torch.linalg.qr(torch.randn(16, 4)).Q @ torch.randn(4, 16))
    adapter = graft.attach(student, "adalora", rank=1, initial_rank=4, interval=5, warmup=0.2, final=0.3, orthogonality=0.05)
    optimizer = adapter.optimizer(lr=1e-2, total_steps=300)
    generator = torch.Generator().manual_seed(1)
    student.train()
    for _ in range(300):
        x = torch.randn(64, 16, generator=generator)
        with torch.no_grad():
            y = teacher(x)
        (student(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    left = [int((adapter.deltas[f"maps.{i}"].E != 0).sum()) for i in range(8)]
    assert sum(left) == 8
    assert sum(left[i] for i in changed) >= 7  # 2 by chance


def test_pruned_triplets_in_a_language_model() -> None:
    """The same on real targets with an untouched loop: the count is right at the end, and the model still learns."""
    model = tiny.llama()
    adapter = graft.attach(model, "adalora", rank=2, initial_rank=3, interval=2)
    optimizer = adapter.optimizer(lr=1e-2, total_steps=20)
    losses = tiny.train(model, optimizer, tiny.causal_batches(), 20)
    assert alive(adapter) == 2 * len(adapter.deltas)
    assert losses[-1] < losses[0]
