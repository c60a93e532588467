"""What only NOLA promises: a few coefficients on matrices that nobody stores."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import graft
from tests import tiny
from tests.methods.small import layer, randomise


def test_the_factors_are_sums_of_the_matrices() -> None:
    model = layer().double()
    adapter = graft.attach(model, "nola", rank=3, count=5, alpha=6.0)
    (delta,) = adapter.deltas.values()
    randomise(delta)
    P, Q = adapter.shared.P.double(), adapter.shared.Q.double()
    A = delta.A0 + sum(delta.a[i] * P[:9, :, i].T for i in range(5))
    B = sum(delta.c[i] * Q[:6, :, i] for i in range(5))
    torch.testing.assert_close(delta.weight()[0], model[0].weight + 2.0 * B @ A)


def test_matrices_are_uniform_over_the_root_of_their_number() -> None:
    bases = graft.attach(layer(60, 90), "nola", rank=8, count=25).shared
    for name, size in (("P", 90), ("Q", 60)):
        values = getattr(bases, name)
        assert values.shape == (size, 8, 25)
        assert values.abs().max() <= 1 / 5
        assert abs(values.std().item() - 1 / 5 / 3**0.5) < 0.002


def test_at_the_start_only_b_has_a_gradient() -> None:
    model = layer()
    (delta,) = graft.attach(model, "nola", rank=3, count=5).deltas.values()
    model(torch.randn(5, 9)).square().sum().backward()
    assert not delta.a.grad.any()
    assert delta.c.grad.abs().min() > 0


def test_the_size_depends_on_nothing_but_the_number(tmp_path: Path) -> None:
    for rank in (1, 3):
        adapter = graft.attach(tiny.llama(), "nola", rank=rank, count=20)
        assert adapter.parameter_count == 40 * len(adapter.deltas)
        adapter.save(tmp_path / str(rank))
        assert sum(v.numel() for v in load_file(tmp_path / str(rank) / "adapter_model.safetensors").values()) == adapter.parameter_count


def test_enough_matrices_span_every_factor() -> None:
    adapter = graft.attach(layer(6, 9).double(), "nola", rank=2, count=30)
    columns = adapter.shared.P.double().reshape(18, 30)
    wanted = torch.randn(18, dtype=torch.float64)
    solution = torch.linalg.lstsq(columns, wanted[:, None]).solution
    torch.testing.assert_close(columns @ solution, wanted[:, None])
