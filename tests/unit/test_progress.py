"""Long work says how far it is; who watches hears it, and the command line draws a bar once it takes long."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import graft
from graft.cli import show
from graft.core.calibration import Calibration
from graft.core.progress import followed, watched


def test_each_watcher_hears_its_own() -> None:
    outer: list[tuple[str, int, int]] = []
    inner: list[tuple[str, int, int]] = []
    assert list(followed("ab", "alone")) == ["a", "b"]
    with watched(lambda *heard: outer.append(heard)):
        with watched(lambda *heard: inner.append(heard)):
            assert list(followed("ab", "letters")) == ["a", "b"]
        assert list(followed("", "nothing")) == []
    assert inner == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2)]
    assert outer == [("nothing", 0, 0)]


def test_attaching_and_calibrating_are_followed() -> None:
    model, heard = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), []
    batches = [{"input": torch.randn(2, 4)} for _ in range(3)]
    calibration = Calibration(model, batches, loss=lambda module, batch: module(batch["input"]).square().sum())
    with watched(lambda *one: heard.append(one)):
        graft.attach(model, "shira", rank=1, mask="gradient", calibration=calibration)
    assert heard == [("making the adapter", n, 2) for n in range(3)] + [("calibrating", n, 3) for n in range(4)]


@pytest.mark.parametrize(("step", "shown"), [(0.1, False), (2.0, True)])
def test_a_bar_shows_only_where_it_takes_long(monkeypatch: pytest.MonkeyPatch, step: float, shown: bool) -> None:
    text, clock = io.StringIO(), iter(range(100))
    monkeypatch.setattr(show, "err", Console(file=text, force_terminal=True, width=200))
    monkeypatch.setattr(show.time, "monotonic", lambda: step * next(clock))
    with show.long_work():
        for _ in range(2):  # the second has a bar of its own
            assert list(followed(range(4), "making the adapter")) == [0, 1, 2, 3]
    assert ("making the adapter" in text.getvalue()) == shown
    assert ("3/4" in text.getvalue()) == shown
