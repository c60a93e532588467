"""What only EVA promises: scikit-learn's principal components of each target's inputs, and ranks where they explain most."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, IncrementalPCA
from torch import Tensor, nn

import graft
from graft.core.target import find_targets
from tests import tiny
from tests.methods.small import layer

Batch = dict[str, Tensor]


def one_batch() -> list[Batch]:
    return tiny.causal_batches(1, rows=12)


def heard(model: nn.Module, batches: list[Batch], counts: list[Tensor]) -> dict[str, Tensor]:
    """The inputs of every linear map at the positions that count, by hooks of the test's own."""
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        t.module.register_forward_pre_hook(lambda m, args, name=t.name: rows.setdefault(name, []).append(args[0].detach()))
        for t in find_targets(model, "linear")
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x[mask] for x, mask in zip(xs, counts, strict=True)]) for name, xs in rows.items()}


def labelled(batches: list[Batch]) -> list[Tensor]:
    return [batch["labels"] != -100 for batch in batches]


def same_up_to_sign(seen: Tensor, wanted: Tensor, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(seen * (seen * wanted).sum(1, keepdim=True).sign(), wanted, atol=tolerance, rtol=tolerance)


class Fork(nn.Module):
    """Linear maps that each read an input of their own: x times a matrix that the test chooses."""

    def __init__(self, *mixes: Tensor):
        super().__init__()
        torch.manual_seed(0)
        self.mixes = mixes
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in mixes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([each(x @ mix) for each, mix in zip(self.maps, self.mixes, strict=True)]).sum(0)


def test_directions_are_sklearns_principal_components() -> None:
    """One portion, so nothing is forgotten: A is the leading components of the mean-centred inputs, B is zero."""
    model, batches = tiny.llama(), one_batch()
    inputs = heard(model, batches, labelled(batches))
    adapter = graft.attach(model, "eva", rank=3, calibration=batches)
    for name, delta in adapter.deltas.items():
        wanted = PCA(delta.rank, svd_solver="full").fit(inputs[name].double().numpy()).components_
        same_up_to_sign(delta.A.detach().double(), torch.tensor(wanted))
        assert not delta.B.any()


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 4.0])
def test_ranks_go_to_the_largest_ratios_over_the_model(rho: float) -> None:
    """Brute force over scikit-learn's explained-variance ratios: the rank * targets largest, at most rho * rank for each."""
    model, batches = tiny.llama(), one_batch()
    inputs = heard(model, batches, labelled(batches))
    limit = round(rho * 3)
    ratios = []
    for order, (name, rows) in enumerate((t.name, inputs[t.name]) for t in find_targets(model, "linear")):
        found = PCA(limit, svd_solver="full").fit(rows.double().numpy()).explained_variance_ratio_
        ratios += [(-round(float(ratio), 6), order, name) for ratio in found]
    chosen = [name for _, _, name in sorted(ratios)[: 3 * 14]]
    adapter = graft.attach(model, "eva", rank=3, rho=rho, calibration=batches)
    ranks = {name: delta.rank for name, delta in adapter.deltas.items()}
    assert ranks == {name: chosen.count(name) for name in dict.fromkeys(t.name for t in find_targets(tiny.llama(), "linear")) if name in chosen}
    assert sum(ranks.values()) == 3 * 14
    assert max(ranks.values()) <= limit
    assert all(delta.scale == 2.0 for delta in adapter.deltas.values())  # alpha / rank stays at every rank
    if rho == 1:
        assert set(ranks.values()) == {3}
    else:
        assert len(set(ranks.values())) > 1


@settings(max_examples=50, deadline=None)
@given(
    ratios=st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5]), min_size=1, max_size=5), min_size=1, max_size=5),
    budget=st.integers(1, 30),
)
def test_the_split_of_a_budget(ratios: list[list[float]], budget: int) -> None:
    """Largest first, ties to the earlier target, nothing for a ratio of zero; against taking them one by one."""
    given_ = {str(i): torch.tensor(sorted(r, reverse=True)) for i, r in enumerate(ratios)}
    left, wanted = {name: r.tolist() for name, r in given_.items()}, dict.fromkeys(given_, 0)
    for _ in range(budget):
        name = max(left, key=lambda n: left[n][0] if left[n] else -1.0)  # max takes the first of equals
        if left[name] and left[name][0] > 0:
            left[name].pop(0)
            wanted[name] += 1
    assert graft.EVA.ranks(given_, budget) == wanted


def test_rows_of_a_are_orthonormal() -> None:
    """Also over several portions, at the ranks that come out."""
    adapter = graft.attach(tiny.llama(), "eva", rank=4, calibration=tiny.causal_batches(4))
    for delta in adapter.deltas.values():
        torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(delta.rank), atol=1e-5, rtol=0)


def test_several_batches_are_sklearns_incremental_pca() -> None:
    """Batch by batch, with the tail of each update forgotten."""
    batches = tiny.causal_batches(3)
    inputs = [heard(tiny.llama(), [batch], labelled([batch])) for batch in batches]
    adapter = graft.attach(tiny.llama(), "eva", rank=3, rho=1.0, calibration=batches)
    for name, delta in adapter.deltas.items():
        oracle = IncrementalPCA(3)
        for portion in inputs:
            oracle.partial_fit(portion[name].double().numpy())
        same_up_to_sign(delta.A.detach().double(), torch.tensor(oracle.components_))


def test_whitening_divides_by_the_root_of_the_singular_value() -> None:
    model, batches = tiny.llama(), one_batch()
    inputs = heard(model, batches, labelled(batches))
    adapter = graft.attach(model, "eva", rank=3, whiten=True, calibration=batches)
    for name, delta in adapter.deltas.items():
        oracle = PCA(delta.rank, svd_solver="full").fit(inputs[name].double().numpy())
        wanted = torch.tensor(oracle.components_ / oracle.singular_values_[:, None] ** 0.5)
        same_up_to_sign(delta.A.detach().double(), wanted)


def test_targets_with_one_input_start_at_the_same_directions() -> None:
    adapter = graft.attach(tiny.llama(), "eva", rank=3, calibration=tiny.causal_batches())
    for block in (0, 1):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            group = [adapter.deltas[f"model.layers.{block}.{n}"].A for n in names if f"model.layers.{block}.{n}" in adapter.deltas]
            least = min(map(len, group))
            assert len(group) > 1
            assert all(torch.equal(A[:least], group[0][:least]) for A in group)


@pytest.mark.parametrize("labels", [True, False])
def test_padded_and_unlabelled_tokens_do_not_matter(labels: bool) -> None:
    """Garbage in the place of the padding at the end: the same start."""
    starts = []
    for garbage in (False, True):
        batches = tiny.causal_batches(2)
        for batch in batches:
            batch["attention_mask"][:, -3:] = 0
            batch["labels"][:, -3:] = -100
            batch["input_ids"][:, -3:] = 7 if garbage else 0
            if not labels:
                del batch["labels"]
        adapter = graft.attach(tiny.llama(), "eva", rank=3, calibration=batches)
        starts.append({name: delta.A.detach() for name, delta in adapter.deltas.items()})
    assert starts[0].keys() == starts[1].keys()
    for name, A in starts[0].items():
        torch.testing.assert_close(A, starts[1][name], atol=1e-4, rtol=1e-4)


def test_labelled_tokens_are_the_only_ones_that_count() -> None:
    """The start of a calibration with labels is that of its labelled positions alone (checked above), not of all of them."""
    with_labels, without = (
        graft.attach(tiny.llama(), "eva", rank=3, rho=1.0, calibration=[{k: v for k, v in b.items() if k != "labels" or keep} for b in one_batch()])
        for keep in (True, False)
    )
    name = "model.layers.0.mlp.down_proj"
    assert not torch.allclose(with_labels.deltas[name].A.abs(), without.deltas[name].A.abs(), atol=1e-2)


def test_a_constant_input_gets_rank_zero() -> None:
    """0 / 0 is no share of the variance: the target is left to the base and the others take its ranks."""
    torch.manual_seed(1)
    model = Fork(torch.zeros(8, 8), torch.eye(8), torch.eye(8) * 2)
    adapter = graft.attach(model, "eva", rank=3, calibration=[{"x": torch.randn(40, 8)}])
    assert list(adapter.deltas) == ["maps.1", "maps.2"]
    assert sum(delta.rank for delta in adapter.deltas.values()) == 9
    assert all(delta.A.isfinite().all() for delta in adapter.deltas.values())
    assert "forward" not in model.maps[0].__dict__  # nothing stands in the way of the base


def test_only_constant_inputs_are_refused() -> None:
    """An adapter that would train nothing is a mistake, not a result."""
    model = Fork(torch.zeros(8, 8), torch.zeros(8, 8))
    with pytest.raises(graft.GraftError, match="constant"):
        graft.attach(model, "eva", rank=2, calibration=[{"x": torch.randn(40, 8)}])
    assert not graft.adapters_of(model)


def test_a_target_that_was_not_reached_is_refused() -> None:
    """There is nothing to start it from, and a random start would not be what was asked for."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Idle()
    with pytest.raises(graft.GraftError, match="idle"):
        graft.attach(model, "eva", targets="all", rank=2, calibration=[{"x": torch.randn(40, 8)}])
    assert not graft.adapters_of(model)


def test_an_input_in_two_dimensions_gets_at_most_two_ranks() -> None:
    """The other target has full-rank inputs with enough directions to take all the rest."""
    torch.manual_seed(1)
    model = Fork(torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])), torch.eye(8))
    adapter = graft.attach(model, "eva", rank=3, calibration=[{"x": torch.randn(200, 8)}])
    assert {name: delta.rank for name, delta in adapter.deltas.items()} == {"maps.0": 2, "maps.1": 4}


def test_it_rebuilds_the_inputs_better_than_a_random_start() -> None:
    """||x - x A^T A|| is least for the leading directions, against orthonormal random ones of the same number."""
    batches = one_batch()
    inputs = heard(tiny.llama(), batches, labelled(batches))
    adapter = graft.attach(tiny.llama(), "eva", rank=6, rho=1.0, calibration=batches)
    for name, delta in adapter.deltas.items():
        x = inputs[name] - inputs[name].mean(0)
        other = torch.linalg.qr(torch.randn(x.shape[1], 6, generator=torch.Generator().manual_seed(0))).Q
        A = delta.A.detach()
        assert (x - x @ A.T @ A).norm() < 0.95 * (x - x @ other @ other.T).norm()


def test_it_needs_a_method_with_factors() -> None:
    with pytest.raises(graft.GraftError, match="does not have"):
        graft.attach(layer(), graft.SHiRA(rank=1), init=graft.EVA(), calibration=[{"x": torch.randn(9, 9)}])
