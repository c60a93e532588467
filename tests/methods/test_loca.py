"""What only LoCA promises: the cosine transform (against scipy), gradients of places by central differences, and whose turn it is."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn, idctn
from torch import Tensor, nn

import graft
from graft.methods.deltas.loca import LoCADelta, Turns
from tests.methods.small import layer


def loca(model: nn.Module, **options: object) -> tuple[graft.Adapter, LoCADelta]:
    adapter = graft.attach(model, "loca", **{"count": 5, **options})
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, LoCADelta)
    return adapter, delta


def put(delta: LoCADelta, places: list[tuple[int, int]], values: list[float]) -> None:
    """These coefficients at these places."""
    steps = torch.tensor(delta.target.shape, dtype=torch.float64)[:, None] - 1
    with torch.no_grad():
        delta.p.copy_(torch.tensor(places, dtype=torch.float64).T / steps.clamp(min=1))
        delta.a.copy_(torch.tensor(values, dtype=torch.float64))


def update_of(delta: LoCADelta) -> Tensor:
    return (delta.weight()[0] - delta.target.weight()).detach()


sizes = st.integers(1, 9)


@settings(max_examples=30, deadline=None)
@given(out=sizes, width=sizes, scale=st.floats(-5, 5), seed=st.integers(0, 99), data=st.data())
def test_the_update_is_scipy_s_inverse_transform(out: int, width: int, scale: float, seed: int, data: st.DataObject) -> None:
    """Coefficients at one place add up."""
    place = st.tuples(st.integers(0, out - 1), st.integers(0, width - 1))
    places = data.draw(st.lists(place, min_size=1, max_size=8))
    values = torch.randn(len(places), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    _, delta = loca(layer(out, width).double(), count=len(places), scale=scale)
    assert not update_of(delta).any()
    put(delta, places, values)
    spectrum = numpy.zeros((out, width))
    for (row, column), value in zip(places, values, strict=True):
        spectrum[row, column] += value
    torch.testing.assert_close(update_of(delta), torch.from_numpy(scale * idctn(spectrum, norm="ortho")))


def test_places_are_rounded_and_stay_inside() -> None:
    _, delta = loca(layer(7, 9).double(), count=4)
    with torch.no_grad():
        delta.p.copy_(torch.tensor([[-3.0, 0.24, 0.26, 7.0], [0.5, 1.0, 0.0, 0.19]]))  # steps 6 and 8
        delta.a.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    spectrum = numpy.zeros((7, 9))
    for row, column, value in ((0, 4, 1), (1, 8, 2), (2, 0, 3), (6, 2, 4)):
        spectrum[row, column] = value
    torch.testing.assert_close(update_of(delta), torch.from_numpy(idctn(spectrum, norm="ortho")))


@settings(max_examples=20, deadline=None)
@given(out=st.integers(2, 8), width=st.integers(2, 8), scale=st.floats(0.2, 5), seed=st.integers(0, 99))
def test_gradients_are_the_transform_and_its_central_differences(out: int, width: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, delta = loca(layer(out, width).double(), scale=scale, seed=seed)
    with torch.no_grad():
        delta.p.copy_(0.99 * torch.rand(2, 5, generator=generator))  # the clamp has no gradient beyond
        delta.a.copy_(torch.randn(5, generator=generator))
        delta.a[0] = 0
    direction = torch.randn(out, width, generator=generator, dtype=torch.float64)
    (delta.weight()[0] * direction).sum().backward()
    Z = dctn(scale * direction.numpy(), norm="ortho")
    a, p = delta.a.tolist(), delta.p.tolist()
    for i in range(5):
        r, c = round(p[0][i] * (out - 1)), round(p[1][i] * (width - 1))
        assert float(delta.a.grad[i]) == pytest.approx(Z[r, c])
        d_row = 0.5 * a[i] * (Z[min(r + 1, out - 1), c] - Z[max(r - 1, 0), c])
        d_column = 0.5 * a[i] * (Z[r, min(c + 1, width - 1)] - Z[r, max(c - 1, 0)])
        assert float(delta.p.grad[0, i]) == pytest.approx(min(max(d_row, -1), 1) * (out - 1))
        assert float(delta.p.grad[1, i]) == pytest.approx(min(max(d_column, -1), 1) * (width - 1))
    assert not delta.p.grad[:, 0].any()  # a coefficient of zero feels no pull


def test_a_place_walks_to_the_coefficient_that_is_missing() -> None:
    """W* has a coefficient at (5, 7); ours begins at (4, 7), then at (5, 6)."""
    for start in ((4, 7), (5, 6)):
        _, delta = loca(layer(9, 12).double(), count=1)
        spectrum = numpy.zeros((9, 12))
        spectrum[5, 7] = 1.0
        wanted = torch.from_numpy(idctn(spectrum, norm="ortho"))
        put(delta, [start], [0.5])
        for _ in range(20):
            delta.zero_grad()
            update = delta.weight()[0] - delta.target.weight()
            (0.5 * (update - wanted).square().sum()).backward()
            with torch.no_grad():
                delta.p -= 0.01 * delta.p.grad
                delta.a -= 0.2 * delta.a.grad
        assert delta.exported()["places"].flatten().tolist() == [5, 7]
        put(delta, [(5, 7)], [1.0])
        torch.testing.assert_close(update_of(delta), wanted)


def test_all_places_represent_any_update() -> None:
    _, delta = loca(layer(6, 7).double(), count=42, share=0.0, scale=2.0)
    wanted = torch.randn(6, 7, dtype=torch.float64)
    put(delta, [(r, c) for r in range(6) for c in range(7)], (dctn(wanted.numpy(), norm="ortho") / 2).flatten().tolist())
    torch.testing.assert_close(update_of(delta), wanted)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_values_and_places_take_turns_until_places_stay(micro_batches: int) -> None:
    """Updates 0-9 a, 10-29 p, 30-39 a, 40-59 p, then a alone: by what moves, momentum and weight decay included."""
    model = layer(30, 40)
    adapter, delta = loca(model, share=0.6, count=7, place_lr=0.01)
    optimizer = adapter.optimizer(lr=0.01, total_steps=100, weight_decay=0.1)
    (turns,) = adapter.callbacks
    assert isinstance(turns, Turns)
    x = torch.randn(8, 40)
    model.train()
    for t in range(80):
        a, p = delta.a.detach().clone(), delta.p.detach().clone()
        for _ in range(micro_batches):
            model(x).square().sum().backward()
        expected = "p" if 10 <= t < 30 or 40 <= t < 60 else "a"
        resting = delta.p if expected == "a" else delta.a
        assert not resting.grad.any()  # so that it does not count when gradients are clipped
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, old, new in (("a", a, delta.a), ("p", p, delta.p)) if not torch.equal(old, new)}
        assert moved == {expected}, t
        assert (delta.p in optimizer.state) == (11 <= t + 1 < 60), t
    assert turns.end == 60


def test_places_have_their_own_rate_and_no_weight_decay() -> None:
    adapter, delta = loca(layer(), place_lr=0.5)
    groups = {id(p): group for group in adapter.optimizer(lr=0.1, total_steps=9, weight_decay=0.3).param_groups for p in group["params"]}
    assert groups.keys() == {id(delta.a), id(delta.p)}
    assert (groups[id(delta.a)]["lr"], groups[id(delta.p)]["lr"], groups[id(delta.p)]["weight_decay"]) == (0.1, 0.5, 0.0)


def test_places_that_never_learn_are_no_parameters() -> None:
    adapter, _ = loca(layer(), share=0.0)
    assert adapter.parameter_count == graft.methods()["loca"].cost(6, 9, count=5, share=0.0) == 5
    assert adapter.callbacks == []


def test_files_hold_whole_places_that_mean_the_same_in_any_dtype(tmp_path: Path) -> None:
    model = layer(101, 57)
    adapter, delta = loca(model, count=300)
    with torch.no_grad():
        delta.a.normal_(generator=torch.Generator().manual_seed(0))
        delta.p[:, :2] = torch.tensor([[0.0, 1.5], [-1.0, 0.9995]])
    path = adapter.save(tmp_path)
    places = delta.exported()["places"]
    assert places.dtype == torch.int32
    assert places[:, :2].tolist() == [[0, 100], [0, 56]]
    x = torch.randn(3, 57)
    twin = layer(101, 57).double()
    loaded = graft.load_adapter(twin, path, check_base=False)
    assert torch.equal(next(iter(loaded.deltas.values())).exported()["places"], places)
    torch.testing.assert_close(twin(x.double()).float(), model(x), atol=1e-4, rtol=1e-4)


def test_it_trains_inside_of_distributed_data_parallel(tmp_path: Path) -> None:
    """Which waits for a gradient of every parameter, also of those that rest."""
    ends = []
    for wrapped in (False, True):
        model = layer()
        adapter, _ = loca(model, share=0.6, value_updates=1, place_updates=2, place_lr=0.01)
        optimizer = adapter.optimizer(lr=0.01, total_steps=10)
        if wrapped:
            torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            run = nn.parallel.DistributedDataParallel(model) if wrapped else model
            run.train()
            x = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
            for _ in range(8):
                run(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            if wrapped:
                torch.distributed.destroy_process_group()
        ends.append([p.detach() for p in adapter.parameters()])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two)
