"""The calibration service against a dense trainable copy of the model and hooks of the tests' own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from graft.core.calibration import Calibration, Loss, model_loss
from graft.core.errors import GraftError
from graft.core.target import Target, find_targets
from tests import tiny

Batch = dict[str, Tensor]


def dense_gradients(model: nn.Module, batches: list[Batch], targets: list[Target], loss: Loss = model_loss) -> dict[str, Tensor]:
    """The mean over batches of autograd's dL/dW, each in the shape [out, in]."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    for batch in batches:
        (loss(twin, batch) / len(batches)).backward()
    return {t.name: t.view(twin.get_submodule(t.name).weight.grad) for t in targets}


def images(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixels": torch.randn(3, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1, 2])} for _ in range(count)]


def conv_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["pixels"]), batch["labels"])


class Images(nn.Module):
    """The convolutions behind the keyword arguments that batches are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.conv()

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return self.net(pixels)


MODELS = {
    "llama": (tiny.llama, tiny.causal_batches),
    "llama-bias": (lambda: tiny.llama(bias=True), tiny.causal_batches),
    "gpt2-conv1d": (tiny.gpt2, tiny.causal_batches),
    "bert": (tiny.bert, tiny.classifier_batches),
}


def weights(target: Target) -> bool:
    return target.kind != "norm" and target.pointwise


# ---- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_autograd_on_a_dense_copy(name: str) -> None:
    make, batches = MODELS[name]
    model = make()
    tied = ("lm_head", "transformer.wte") if name == "gpt2-conv1d" else ()  # two users of one parameter: see below
    targets = find_targets(model, lambda t: weights(t) and t.name not in tied)
    wanted = dense_gradients(model, batches(), targets)
    seen = dict(Calibration(model, batches()).gradients(targets))
    assert [t.name for t in seen] == [t.name for t in targets]
    for target, gradient in seen.items():
        assert gradient.dtype == torch.float32
        assert wanted[target.name].any()
        torch.testing.assert_close(gradient, wanted[target.name], atol=1e-6, rtol=1e-4)


def test_gradients_of_convolutions_and_a_loss_of_ones_own() -> None:
    model = Images()
    targets = find_targets(model, lambda t: t.kind == "conv2d" and t.pointwise)
    assert len(targets) == 2  # one of them strided
    wanted = dense_gradients(model.net, images(), [Target(t.name.removeprefix("net."), t.module, t.kind) for t in targets], conv_loss)
    calibration = Calibration(model, images(), lambda m, b: nn.functional.cross_entropy(m(**b), b["labels"]))
    for target, gradient in calibration.gradients(targets):
        torch.testing.assert_close(gradient, wanted[target.name.removeprefix("net.")], atol=1e-6, rtol=1e-4)


def test_a_tied_weight_gets_the_part_of_each_user() -> None:
    """The embedding's and the head's gradients add up to autograd's gradient of the one parameter."""
    model = tiny.llama(tied=True)
    targets = find_targets(model, lambda t: t.kind == "embedding" or t.name == "lm_head")
    twin = copy.deepcopy(model).requires_grad_(True)
    batches = tiny.causal_batches(1)
    twin(**batches[0]).loss.backward()
    parts = {t.kind: g for t, g in Calibration(model, batches).gradients(targets)}
    torch.testing.assert_close(parts["linear"] + parts["embedding"].T, twin.lm_head.weight.grad, atol=1e-6, rtol=1e-4)


def test_the_padding_row_of_an_embedding_has_no_gradient() -> None:
    """torch never trains the row ``padding_idx``, even where it is read at a position that counts."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, padding_idx=2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).square().sum()

    model, batch = Bag(), {"ids": torch.tensor([[0, 2, 1, 2]])}
    with torch.no_grad():
        model.table.weight[2] = 1.0  # many models fill it, so its output has a gradient
    targets = find_targets(model, "embedding")
    wanted = dense_gradients(model, [batch], targets, lambda m, b: m(**b))
    ((_, seen),) = Calibration(model, [batch], lambda m, b: m(**b)).gradients(targets)
    torch.testing.assert_close(seen, wanted["table"])


@pytest.mark.parametrize("memory", [1, 20_000])
def test_portions_of_memory_change_nothing(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one byte each target has its own pass over the batches; the numbers are those of one pass for all."""
    model, batches = tiny.llama(), tiny.causal_batches(2)
    targets = find_targets(model, "linear")
    whole = {t.name: g for t, g in Calibration(model, batches).gradients(targets)}
    portions = []
    original = Calibration._gradients
    monkeypatch.setattr(Calibration, "_gradients", lambda self, part: portions.append(list(part)) or original(self, part))
    seen = {t.name: g for t, g in Calibration(model, batches).gradients(targets, memory=memory)}
    assert list(seen) == list(whole)
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-7, rtol=1e-5)
    assert len(portions) == len(targets) if memory == 1 else 1 < len(portions) < len(targets)
    assert all(len(part) == 1 or sum(4 * t.shape[0] * t.shape[1] for t in part) <= memory for part in portions)


def test_a_module_that_runs_twice_gets_both_parts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.map = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(self.map(x).tanh()).square().sum()

    model, batch = Twice(), {"x": torch.randn(3, 4)}
    targets = find_targets(model, "map")
    wanted = dense_gradients(model, [batch], targets, lambda m, b: m(**b))
    ((_, seen),) = Calibration(model, [batch], lambda m, b: m(**b)).gradients(targets)
    torch.testing.assert_close(seen, wanted["map"])


def test_a_target_that_the_loss_does_not_read_has_gradient_zero() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.ignored, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.ignored(x)
            return self.used(x).square().sum()

    model = Branch()
    calibration = Calibration(model, [{"x": torch.randn(3, 4)}], lambda m, b: m(**b))
    seen = {t.name: g for t, g in calibration.gradients(find_targets(model, "all"))}
    assert seen["used"].any()
    assert not seen["ignored"].any()
    assert not seen["never"].any()


def test_nothing_is_left_behind() -> None:
    """Training modes, requires_grad and .grad of every parameter are those of before, hooks are gone; also after an error."""
    model = tiny.llama()
    model.train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    model.model.norm.weight.grad = torch.full_like(model.model.norm.weight, 7.0)

    def look() -> list[object]:
        modules = [(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
        return [*modules, *((n, p.requires_grad, None if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters())]

    before, targets = look(), find_targets(model, "linear")
    calibration = Calibration(model, tiny.causal_batches(2))
    for _ in calibration.gradients(targets):
        assert look() == before
    calibration.groups(targets)
    calibration.covariances(targets)
    assert look() == before
    with pytest.raises(ZeroDivisionError):
        calibration.inputs(targets, lambda target, rows: bool(1 / 0))
    with pytest.raises(GraftError, match="labels"):
        list(Calibration(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]).gradients(targets))
    assert look() == before


def test_dropout_is_off_while_calibrating() -> None:
    """Two passes over a model in train mode with dropout agree, and equal the model in eval mode."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.drop, self.second = nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.drop(self.first(x))).square().sum()

    model = Noisy().train()
    batch, targets = {"x": torch.randn(3, 6)}, find_targets(model, "all")
    seen = {t.name: g for t, g in Calibration(model, [batch], lambda m, b: m(**b)).gradients(targets)}
    for name, wanted in dense_gradients(model, [batch], targets, lambda m, b: m(**b)).items():
        torch.testing.assert_close(seen[name], wanted)


# ---- activations --------------------------------------------------------------------------------------------------------


def heard(model: nn.Module, batch: Batch, name: str) -> Tensor:
    """The inputs of a module, through a hook of the test's own."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: kept.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return kept[0]


def collected(calibration: Calibration, targets: list[Target], labelled: bool = True) -> dict[str, list[Tensor]]:
    rows: dict[str, list[Tensor]] = {}
    calibration.inputs(targets, lambda target, x: rows.setdefault(target.name, []).append(x), labelled)
    return rows


NAMES = ["model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("case", ["labels", "attention", "both", "neither"])
def test_which_positions_count(case: str) -> None:
    """Labelled positions where there are such labels, never padding."""
    model = tiny.llama()
    batches = tiny.causal_batches(2)
    if case == "attention":
        batches = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
    if case == "both":  # labels that forgot the padding
        batches = [{**b, "labels": b["input_ids"].clone().index_fill_(1, torch.tensor([0]), -100)} for b in batches]
    if case == "neither":
        batches = [{"input_ids": b["input_ids"]} for b in batches]
    rows = collected(Calibration(model, batches), find_targets(model, NAMES))
    for name in NAMES:
        for batch, seen in zip(batches, rows[name], strict=True):
            counts = batch["labels"] != -100 if "labels" in batch else torch.ones_like(batch["input_ids"], dtype=torch.bool)
            counts = counts & batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            assert torch.equal(seen, heard(model, batch, name)[counts])


def test_unlabelled_positions_count_on_request() -> None:
    model, batches = tiny.llama(), tiny.causal_batches(1)
    rows = collected(Calibration(model, batches), find_targets(model, NAMES), labelled=False)
    assert torch.equal(rows[NAMES[0]][0], heard(model, batches[0], NAMES[0])[batches[0]["attention_mask"].bool()])


def test_padding_does_not_count_for_an_embedding_either() -> None:
    """Its inputs are ids, one-hot vectors as rows."""
    model = tiny.bert()
    batch = tiny.classifier_batches(1)[0]
    batch["attention_mask"][0, 5:] = 0
    (target,) = find_targets(model, "*.word_embeddings")
    (seen,) = collected(Calibration(model, [batch]), [target])[target.name]
    assert seen.argmax(1).tolist() == batch["input_ids"][batch["attention_mask"].bool()].tolist()


def test_a_model_that_flattens_tokens_is_masked_too() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.map = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.map(self.table(input_ids).flatten(0, 1))

    model = Flat()
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    (seen,) = collected(Calibration(model, [batch]), find_targets(model, "map"))["map"]
    assert torch.equal(seen, model.table.weight[[1, 2, 3, 4, 5]])


def test_images_have_no_token_mask() -> None:
    """Labels of a classifier are one number an image; patches and pixels all count, unfolded as the convolution reads them."""
    model, batches = tiny.vit(), [{"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, -100])}]
    (target,) = find_targets(model, "*.projection")
    (seen,) = collected(Calibration(model, batches), [target])[target.name]
    wanted = nn.functional.unfold(batches[0]["pixel_values"], 8, stride=8).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(seen, wanted)


def test_a_target_that_is_satisfied_is_asked_no_more() -> None:
    model, batches = tiny.llama(), tiny.causal_batches(3)
    targets, calls, runs = find_targets(model, NAMES), [], []
    model.register_forward_pre_hook(lambda module, args: runs.append(1))

    def consume(target: Target, rows: Tensor) -> bool:
        calls.append(target.name)
        return target.name == NAMES[0] or calls.count(target.name) == 2

    Calibration(model, batches).inputs(targets, consume)
    assert [calls.count(name) for name in NAMES] == [1, 2]
    assert len(runs) == 2  # the third batch is not run at all


def test_groups_are_the_targets_that_read_one_tensor() -> None:
    model = tiny.llama()
    groups = [[t.name for t in group] for group in Calibration(model, tiny.causal_batches(1)).groups(find_targets(model, "linear"))]
    wanted = []
    for layer in ("model.layers.0", "model.layers.1"):
        wanted += [[f"{layer}.self_attn.{n}_proj" for n in "qkv"], [f"{layer}.self_attn.o_proj"]]
        wanted += [[f"{layer}.mlp.{n}_proj" for n in ("gate", "up")], [f"{layer}.mlp.down_proj"]]
    assert groups == wanted


def test_equal_shapes_and_reused_memory_do_not_make_a_group() -> None:
    """The second map reads what was written over the first one's input, in place."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.first(x)
            return y + self.second(x.mul_(2))

    model = InPlace()
    assert len(Calibration(model, [{"x": torch.ones(2, 4)}]).groups(find_targets(model, "all"))) == 2


def test_covariances_are_the_second_moment_of_the_inputs() -> None:
    model, batches = tiny.llama(), tiny.causal_batches(3)
    seen = Calibration(model, batches).covariances(find_targets(model, NAMES))
    for name in NAMES:
        rows = torch.cat([heard(model, b, name)[b["attention_mask"].bool()] for b in batches]).double()
        torch.testing.assert_close(seen[name].double(), rows.T @ rows / len(rows), atol=1e-6, rtol=1e-5)


def test_batches_may_be_an_iterator_and_must_not_be_empty() -> None:
    def stream() -> Iterator[Batch]:
        yield from tiny.causal_batches(2)

    model = tiny.llama()
    calibration = Calibration(model, stream())
    assert len(collected(calibration, find_targets(model, NAMES))[NAMES[0]]) == 2
    assert len(collected(calibration, find_targets(model, NAMES))[NAMES[0]]) == 2  # a second pass sees them again
    with pytest.raises(GraftError, match="at least one"):
        Calibration(model, [])
