"""The catalogue on real weights: a few targets in the first and the last block, one short prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.core.catalogue import Method
from graft.core.errors import GraftError
from graft.core.target import Target, all_targets
from tests.methods.small import quiet_peft

pytestmark = [pytest.mark.real, quiet_peft]
ROWS = [pytest.param(row, id=row.name) for row in graft.methods()]


class Real:
    """A packaged model with a prompt, and the bits that it must keep."""

    def __init__(self, name: str):
        try:
            self.model, tokenizer = graft.load(name)
        except GraftError as error:
            pytest.skip(str(error))
        tokens = tokenizer(["The film was a quiet delight from start to finish."], return_tensors="pt")
        self.batch = {key: value for key, value in tokens.items() if key in ("input_ids", "attention_mask")}
        self.last = max(t.depth for t in all_targets(self.model) if t.depth is not None)
        self.bits = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.plain = self.output()

    def output(self, model: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            found = (model or self.model)(**self.batch)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        found = model(**batch)
        return (found.logits if hasattr(found, "logits") else found.last_hidden_state).pow(3).mean()

    def chosen(self, target: Target) -> bool:
        return target.depth in (0, self.last) and target.role in ("q", "v", "o", "down")

    def attach(self, row: Method) -> graft.Adapter:
        options: dict[str, Any] = {"calibration": [self.batch], "loss": self.loss} if row.needs else {}
        settings = {o.name: 4 for o in row.options() if o.name in ("rank", "initial_rank", "output_rank")}
        if row.name == "boft":
            settings["factors"] = 1  # more of them PEFT runs with its CUDA kernel only
        return graft.attach(self.model, row.name, targets=self.chosen, **settings, **options)

    def is_base(self) -> bool:
        state = self.model.state_dict()
        return state.keys() == self.bits.keys() and all(torch.equal(state[key], value) for key, value in self.bits.items())


@pytest.fixture(scope="module", params=["smollm2", "minilm"])
def real(request: pytest.FixtureRequest) -> Real:
    return Real(request.param)


@pytest.fixture(autouse=True)
def _leaves_nothing(real: Real) -> Iterator[None]:
    yield
    graft.detach(real.model)


def disturb(adapter: graft.Adapter) -> graft.Adapter:
    """Noise of a tenth of each parameter's own size, and of 0.03 where it starts smaller than that."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            size = max(0.1 * float(parameter.abs().mean()), 0.03)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapter


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).double().norm() / two.double().norm())


@pytest.mark.parametrize("row", ROWS)
def test_conformance(real: Real, row: Method, tmp_path: Path) -> None:
    adapter = real.attach(row)
    if row.starts_as_identity:
        assert relative(real.output(), real.plain) < 1e-4  # fp32 through up to 30 blocks
    disturb(adapter)
    changed = real.output()
    moved = relative(changed, real.plain)
    assert moved > 3e-4  # well above the tolerances below
    if row.mergeable == "exactly":
        report = adapter.merge()
        assert report.worst[1] == 0
        assert relative(real.output(), changed) < 1e-4
        adapter.unmerge()
        assert torch.equal(real.output(), changed)
    adapter.save(tmp_path)
    graft.detach(real.model)
    assert real.is_base()
    assert torch.equal(real.output(), real.plain)
    graft.load_adapter(real.model, tmp_path)
    assert relative(real.output(), changed) < 1e-5
    graft.detach(real.model)
    if row.delta.peft is not None:
        import peft

        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(real.model), str(tmp_path)).eval()
        assert relative(real.output(theirs), changed) < 1e-4
