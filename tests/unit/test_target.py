"""Finding targets, and the layouts of each kind of module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graft
from graft.core.target import Target, all_targets, find_targets
from tests import tiny


def names(model: nn.Module, spec: object = "linear", **options: object) -> list[str]:
    return [target.name for target in find_targets(model, spec, **options)]  # type: ignore[arg-type]


def test_llama() -> None:
    model = tiny.llama()
    block = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert names(model) == [f"model.layers.{i}.{name}" for i in (0, 1) for name in block]
    assert [t.role for t in find_targets(model)] == ["q", "k", "v", "o", "gate", "up", "down"] * 2
    assert [t.depth for t in find_targets(model)] == [0] * 7 + [1] * 7
    assert {t.name: t.shape for t in find_targets(model)}["model.layers.0.self_attn.k_proj"] == (20, 36)
    assert names(model, "head") == ["lm_head"]
    assert names(model, "embedding") == ["model.embed_tokens"]
    assert len(names(model, "norm")) == 5
    assert len(names(model, "all")) == 14 + 1 + 1 + 5


def test_bert() -> None:
    model = tiny.bert()
    block = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert names(model) == [f"bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in block]
    assert [t.role for t in find_targets(model)] == ["q", "k", "v", "o", "up", "down"] * 2
    assert names(model, "head") == ["classifier"]
    assert len(names(model, "embedding")) == 3


def test_gpt2() -> None:
    model = tiny.gpt2()
    found = find_targets(model)
    assert [t.name.partition(".h.")[2][2:] for t in found] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"] * 2
    assert [t.role for t in found] == ["qkv", "o", "up", "down"] * 2
    assert {t.kind for t in found} == {"conv1d"}
    assert found[0].shape == (108, 36)  # stored as 36 x 108


def test_vit() -> None:
    model = tiny.vit()
    roles = [t.role for t in find_targets(model)]
    assert roles == ["q", "k", "v", "o", "up", "down"] * 2
    assert [t.role for t in find_targets(model, "head")] == ["head"]
    patches = find_targets(model, "conv")
    assert [t.kind for t in patches] == ["conv2d"]
    assert patches[0].shape == (36, 3 * 8 * 8)


def test_conv() -> None:
    model = tiny.conv()
    assert names(model) == ["blocks.0", "blocks.2"]
    assert names(model, "conv") == ["blocks.0", "blocks.2", "depthwise"]
    assert [t.shape for t in find_targets(model, "conv")] == [(10, 27), (14, 90), (14, 9)]
    assert [t.pointwise for t in find_targets(model, "conv")] == [True, True, False]


def test_a_model_without_blocks_uses_all_its_maps() -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(3, 4))
    model.add_module("score", nn.Linear(4, 2))
    assert names(model) == ["first"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("layers.1.*.q_proj", ["model.layers.1.self_attn.q_proj"]),
        ("*.layers.1.mlp.*", [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]),
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        (["lm_head", "*.0.*.[qk]_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "lm_head"]),
        (["v", "v_proj"], ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        (lambda t: t.depth == 1 and t.shape == (52, 36), ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]),
        (("mlp",), [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")]),
        ("attention", [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]),
    ],
)
def test_specs(spec: object, expected: list[str]) -> None:
    assert names(tiny.llama(), spec) == expected


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("q_prj", "'q_proj'"),
        ("lm_haed", "'lm_head'"),
        (["q_proj", "atention"], "matches 'atention'"),
        ("query", "roles .*mlp|roles .*gate"),
        ("conv", "matches 'conv'"),
    ],
)
def test_what_matches_nothing_is_refused_with_what_there_is(spec: object, near: str) -> None:
    model = tiny.llama()
    with pytest.raises(graft.GraftError, match=near) as error:
        graft.attach(model, "lora", targets=spec)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert graft.adapters_of(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_a_function_that_matches_nothing() -> None:
    with pytest.raises(graft.GraftError, match="the given function"):
        find_targets(tiny.llama(), lambda target: False)


def test_a_model_without_targets() -> None:
    with pytest.raises(graft.GraftError, match="holds no linear map"):
        find_targets(nn.Sequential(nn.ReLU()))


def test_kinds_that_a_method_cannot_adapt() -> None:
    with pytest.raises(graft.GraftError, match="narrow the targets"):
        graft.attach(tiny.llama(), "dora", targets=["q_proj", "embed_tokens"], rank=2)
    with pytest.raises(graft.GraftError, match="adapts linear, conv1d, conv2d"):
        graft.attach(tiny.llama(), "dora", targets="norm", rank=2)
    # a role is a wish for all that the method can adapt
    assert len(graft.attach(tiny.llama(), "dora", targets="all", rank=2).deltas) == 15


def test_modules_that_bypass_their_children_are_refused() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "layer": nn.TransformerEncoderLayer(8, 2, 16), "out": nn.Linear(8, 4)})
    assert [t.name for t in all_targets(model)] == ["out"]
    with pytest.raises(graft.GraftError, match=r"MultiheadAttention.*would do nothing"):
        find_targets(model, "attn.out_proj")
    with pytest.raises(graft.GraftError, match="TransformerEncoderLayer"):
        find_targets(model, "layer.linear1")


def test_a_subclass_with_a_forward_of_its_own_is_no_target() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Named(nn.Linear):
        """Adds nothing to what is computed."""

    model = nn.ModuleDict({"scaled": Scaled(3, 4), "named": Named(3, 4), "capped": nn.Embedding(5, 3, max_norm=1.0)})
    assert [t.name for t in all_targets(model)] == ["named"]


class Case:
    def __init__(self, module: nn.Module, x: Tensor):
        self.module, self.x = module, x


def modules() -> dict[str, Callable[[], Case]]:
    from transformers.pytorch_utils import Conv1D

    def conv(*args: object, **options: object) -> Callable[[], Case]:
        return lambda: Case(nn.Conv2d(4, 6, 3, *args, **options), torch.randn(2, 4, 9, 8))  # type: ignore[arg-type]

    return {
        "linear": lambda: Case(nn.Linear(5, 7), torch.randn(2, 3, 5)),
        "linear without bias": lambda: Case(nn.Linear(5, 7, bias=False), torch.randn(5)),
        "conv1d": lambda: Case(Conv1D(7, 5), torch.randn(2, 3, 5)),
        "embedding": lambda: Case(nn.Embedding(7, 5, padding_idx=2), torch.randint(0, 7, (2, 3))),
        "conv2d": conv(),
        "conv2d strided": conv(stride=2, padding=(2, 1), dilation=2),
        "conv2d reflect": conv(padding=1, padding_mode="reflect"),
        "conv2d circular": conv(padding=(1, 2), padding_mode="circular", bias=False),
        "conv2d same": conv(padding="same"),
        "conv2d grouped": conv(groups=2),
    }


@pytest.mark.parametrize("label", modules())
def test_apply_with_the_own_weight_is_the_module(label: str) -> None:
    torch.manual_seed(0)
    case = modules()[label]()
    (target,) = all_targets(nn.ModuleDict({"it": case.module}))
    assert target.weight().shape == target.shape
    torch.testing.assert_close(target.apply(case.x, target.weight(), target.bias), case.module(case.x))
    assert torch.equal(target.stored(target.weight()), case.module.weight)
    assert target.weight().data_ptr() == case.module.weight.data_ptr()  # a view, not a copy
    clone = target.clone_module()
    assert torch.equal(clone(case.x), case.module(case.x))
    with torch.no_grad():
        clone.weight.add_(1)
    assert not torch.equal(clone.weight, case.module.weight)


@pytest.mark.parametrize("label", [label for label in modules() if label != "conv2d grouped"])
def test_apply_then_mix_is_the_product(label: str) -> None:
    torch.manual_seed(0)
    case = modules()[label]()
    (target,) = all_targets(nn.ModuleDict({"it": case.module}))
    B, A = torch.randn(target.shape[0], 3), torch.randn(3, target.shape[1])
    torch.testing.assert_close(target.mix(target.apply(case.x, A), B), target.apply(case.x, B @ A), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("label", ["linear", "conv1d", "embedding", "conv2d", "conv2d strided"])
def test_rows_times_weight_is_the_output(label: str) -> None:
    torch.manual_seed(0)
    case = modules()[label]()
    (target,) = all_targets(nn.ModuleDict({"it": case.module}))
    y = case.module(case.x)
    expected = (y.flatten(2).transpose(1, 2) if y.ndim == 4 else y).reshape(-1, target.shape[0])
    torch.testing.assert_close(F.linear(target.rows(case.x), target.weight(), target.bias), expected)


def test_rows_of_a_grouped_convolution_are_refused() -> None:
    (target,) = all_targets(nn.ModuleDict({"it": nn.Conv2d(4, 6, 3, groups=2)}))
    with pytest.raises(graft.GraftError, match="grouped convolutions"):
        target.rows(torch.randn(1, 4, 5, 5))


def test_facts_of_a_target() -> None:
    target = Target("model.layers.7.mlp.down_proj", nn.Linear(6, 4).bfloat16(), "linear")
    assert (target.role, target.depth, target.shape, target.bytes, target.dtype) == ("down", 7, (4, 6), 48, torch.float32)
    assert not target.weight().requires_grad


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}, {"padding": (0, 2), "stride": 2, "dilation": 2}]
)
def test_rows_of_a_convolution_are_what_its_kernel_is_multiplied_with(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False, **options)
    (target,) = all_targets(nn.Sequential(conv))
    x = torch.randn(2, 3, 9, 8)
    y = conv(x)
    torch.testing.assert_close(target.rows(x) @ target.weight().T, y.flatten(2).transpose(1, 2).flatten(0, 1))
