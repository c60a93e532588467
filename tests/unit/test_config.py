"""Hyper-parameters: types, bounds, choices, and text from a command line."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graft
from graft.core.config import Config, option
from graft.core.errors import nearest


@dataclass(frozen=True, kw_only=True)
class Sample(Config):
    count: int = option(3, "how many", unit="pieces", paper="1..4", low=1, high=9)
    share: float = option(0.5, "which share", low=0, high=1)
    alpha: float | None = option(None, "a scale or none", low=0)
    mode: Literal["fast", "exact"] = option("fast", "how")
    flag: bool = option(False, "whether")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "Sample.count is 0, but it must be at least 1 and at most 9."),
        ({"count": 10}, "Sample.count is 10, but it must be at least 1 and at most 9."),
        ({"count": 2.0}, "Sample.count is 2.0, but it must be of type int."),
        ({"count": True}, "Sample.count is True, but it must be of type int."),
        ({"count": None}, "Sample.count is None, but it must be of type int."),
        ({"count": "two"}, "Sample.count is 'two', but it must be of type int."),
        ({"share": float("nan")}, "Sample.share is nan, but it must be at least 0 and at most 1."),
        ({"share": True}, "Sample.share is True, but it must be of type float."),
        ({"alpha": float("inf")}, "Sample.alpha is inf, but it must be at least 0."),
        ({"alpha": "x"}, "Sample.alpha is 'x', but it must be of type float | none."),
        ({"mode": "fsat"}, "Sample.mode is 'fsat'; did you mean 'fast'?"),
        ({"flag": 1}, "Sample.flag is 1, but it must be of type bool."),
    ],
)
def test_bad_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(graft.GraftError) as error:
        Sample(**settings)
    assert str(error.value) == message


def test_bounds_belong_to_the_values() -> None:
    assert Sample(count=1, share=0, alpha=0).settings() == {"count": 1, "share": 0.0, "alpha": 0.0, "mode": "fast", "flag": False}
    assert Sample(count=9, share=1).share == 1.0
    assert isinstance(Sample(share=1).share, float)  # equal configs write equal files


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"count": "4"}, {"count": 4}), ({"share": "1"}, {"share": 1.0}), ({"share": "1e-2"}, {"share": 0.01}),
        ({"alpha": "none"}, {"alpha": None}),
        ({"alpha": "2"}, {"alpha": 2.0}),
        ({"flag": "true"}, {"flag": True}), ({"flag": "no"}, {"flag": False}), ({"mode": "exact"}, {"mode": "exact"}),
    ],
)  # fmt: skip
def test_text_is_read_as_the_option_s_type(text: dict[str, str], value: dict[str, Any]) -> None:
    assert Sample.parse(text) == Sample(**value)


@pytest.mark.parametrize("text", [{"count": "4.5"}, {"count": ""}, {"flag": "maybe"}, {"share": "much"}, {"share": "nan"}, {"mode": "Fast"}])
def test_text_that_does_not_fit(text: dict[str, str]) -> None:
    with pytest.raises(graft.GraftError, match=f"Sample.{next(iter(text))} is"):
        Sample.parse(text)


def test_unknown_names() -> None:
    with pytest.raises(graft.GraftError, match="Sample has no option 'cuont'; did you mean 'count'"):
        Sample.parse({"cuont": 3})


@given(
    count=st.integers(1, 9), share=st.floats(0, 1), alpha=st.none() | st.floats(0, 1e9), mode=st.sampled_from(["fast", "exact"]), flag=st.booleans()
)
def test_settings_are_the_way_back(**values: Any) -> None:
    config = Sample(**values)
    assert Sample.parse(config.settings()) == config
    assert Sample.parse({name: str(value) for name, value in config.settings().items()}) == config  # also through a command line


def test_configs_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Sample().count = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("method", "settings", "unused"),
    [
        ("nystrom-lora", {"cutoff": 0.5}, "cutoff is 0.5, but core = 'raw' inverts nothing"),
        ("int-tune", {"cutoff": 0.5}, "cutoff is 0.5, but core = 'raw' inverts nothing"),
        ("salt", {"squared": False}, "squared is False, but there is no penalty"),
        ("loca", {"share": 0, "place_lr": 1e-3}, "place_lr is 0.001, but with share = 0 places stay as drawn"),
        ("loca", {"share": 0, "value_updates": 3}, "value_updates is 3, but with share = 0"),
        ("shira", {"fraction": 0.1, "rank": 3}, "rank is 3, but fraction says how many entries there are"),
        ("s2ft", {"smallest": True}, "smallest is True, but select = 'random' looks at no norms"),
    ],
)
def test_options_that_mean_nothing_are_refused(method: str, settings: dict[str, Any], unused: str) -> None:
    with pytest.raises(graft.GraftError, match=re.escape(unused)):
        graft.methods()[method].recipe(**settings)


def test_options_describe_themselves() -> None:
    count, share, alpha, mode, flag = Sample.options()
    assert (count.name, count.type, count.default, count.help, count.unit, count.paper) == ("count", "int", 3, "how many", "pieces", "1..4")
    assert [share.type, alpha.type, mode.type, flag.type] == ["float", "float | none", "fast | exact", "bool"]


def test_nearest() -> None:
    assert nearest("lroa", ["lora", "dora", "shira"]).startswith("did you mean 'lora'")
    assert nearest("zzz", ["b", "a"]) == "allowed: a, b."
    assert nearest("zzz", [f"name{i}" for i in range(30)]).startswith("allowed are 30 names, among them name0")


def test_wrong_method_names() -> None:
    with pytest.raises(graft.GraftError, match=r"no method 'lroa'; did you mean .*'lora'"):
        graft.methods()["lroa"]
    with pytest.raises(AttributeError, match="LoRA"):
        _ = graft.LoRa
    with pytest.raises(graft.GraftError, match=r"allowed are \d+ names, among them adalora"):
        graft.methods()["zzzzzz"]
