"""The fused calls against their one-line definitions: values and gradients, for every shape and dtype they meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graft.kernels import cross_entropy, plan
from graft.kernels.attention import attention, attention_reference
from graft.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from graft.kernels.dropout import STEPS, draw, dropout
from graft.kernels.gate import gate, gate_reference
from graft.kernels.lora import LowRankMap, lora_linear, lora_linear_reference, lora_linears
from graft.kernels.norm import rms_norm, rms_norm_reference
from graft.kernels.rotary import rotate, rotate_reference
from graft.kernels.sparse import scatter, sparse_linear, sparse_linear_reference

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
KERNELS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "lora": (lora_linear, lora_linear_reference),
    "sparse": (sparse_linear, sparse_linear_reference),
}


def inputs(kernel: str, leading: tuple[int, ...], out: int, width: int, size: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    """x, W, b and what is trained: (A, B) of rank ``size``, or (indices, values) of ``size`` entries."""
    generator = torch.Generator().manual_seed(out * 1000 + width * 10 + size)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, W, b = random(*leading, width).requires_grad_(), random(out, width), random(out) if bias else None
    if kernel == "lora":
        return x, W, b, random(size, width).requires_grad_(), random(out, size).requires_grad_()
    indices = torch.randperm(out * width, generator=generator)[: min(size, out * width)]
    return x, W, b, indices, random(len(indices)).requires_grad_()


def trained_in(given: Any) -> list[Tensor]:
    return [t for t in given if isinstance(t, Tensor) and t.requires_grad]


def gradients(function: Callable[..., Tensor], given: Any) -> list[Tensor]:
    """The output and the gradients of everything that is trained, for a loss whose gradient differs at each output."""
    y, trained = function(*given), trained_in(given)
    first = 0 if y.ndim else 1  # sin(0) would hide the gradient of a single number
    probe = torch.sin(torch.arange(first, first + y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * probe).sum(), trained)]


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple),
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    size=st.integers(1, 6),
    bias=st.booleans(),
)
def test_values_and_gradients_equal_the_definition(kernel: str, leading: tuple[int, ...], out: int, width: int, size: int, bias: bool) -> None:
    """Also without rows at all (an empty batch), for a single vector, and for sizes of one."""
    fast, reference = KERNELS[kernel]
    given_ = inputs(kernel, leading, out, width, size, bias)
    for seen, wanted in zip(gradients(fast, given_), gradients(reference, given_), strict=True):
        torch.testing.assert_close(seen, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_equal_finite_differences(kernel: str) -> None:
    assert torch.autograd.gradcheck(KERNELS[kernel][0], inputs(kernel, (2, 3), 5, 7, 3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_need_not_be_contiguous(kernel: str) -> None:
    fast, reference = KERNELS[kernel]
    x, W, b, first, second = inputs(kernel, (3, 4), 5, 7, 3)
    x = torch.randn(7, 4, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    W = torch.randn(7, 5, dtype=torch.float64).T  # how GPT-2's Conv1D stores it
    assert not x.is_contiguous()
    assert not W.is_contiguous()
    for seen, wanted in zip(gradients(fast, (x, W, b, first, second)), gradients(reference, (x, W, b, first, second)), strict=True):
        torch.testing.assert_close(seen, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expanded_gradient_is_taken(kernel: str) -> None:
    """``y.sum().backward()`` hands over a gradient of stride 0, which cannot be viewed as rows."""
    fast, reference = KERNELS[kernel]
    given_ = inputs(kernel, (2, 3), 5, 7, 3)
    trained = [t for t in given_ if t is not None and t.requires_grad]
    for seen, wanted in zip(torch.autograd.grad(fast(*given_).sum(), trained), torch.autograd.grad(reference(*given_).sum(), trained), strict=True):
        torch.testing.assert_close(seen, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_low_precision_base_with_fp32_factors(kernel: str, bias: bool) -> None:
    """y keeps x's dtype, the gradients arrive in the factors' own dtype, and both are right to the base's precision."""
    fast, reference = KERNELS[kernel]
    exact = inputs(kernel, (3, 4), 6, 8, 2, bias, torch.float32)
    x, W, b, first, second = exact
    low = (x.detach().bfloat16().requires_grad_(), W.bfloat16(), None if b is None else b.bfloat16(), first, second)
    seen, wanted = gradients(fast, low), gradients(reference, exact)
    trained = [t for t in exact if t is not None and t.requires_grad]
    assert seen[0].dtype == seen[1].dtype == torch.bfloat16
    assert [g.dtype for g in seen[2:]] == [t.dtype for t in trained[1:]]
    for s, w in zip(seen, wanted, strict=True):
        assert (s.float() - w).norm() <= 0.02 * w.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_base_in_another_precision_than_x(kernel: str) -> None:
    """Also the bias is cast, as in ``Target.apply``."""
    fast, reference = KERNELS[kernel]
    x, W, b, first, second = inputs(kernel, (3,), 6, 8, 2, dtype=torch.float32)
    assert b is not None
    y = fast(x, W.bfloat16(), b.bfloat16(), first, second)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference(x, W.bfloat16().float(), b.bfloat16().float(), first, second))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast(kernel: str, inside: bool) -> None:
    """Under autocast (the Trainer's ``bf16=True`` on an fp32 model) the call behaves like ``F.linear``: computes in bf16, gradients in fp32."""
    fast, reference = KERNELS[kernel]
    given_ = inputs(kernel, (3, 4), 6, 8, 2, dtype=torch.float32)
    trained = [t for t in given_ if t is not None and t.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(*given_)
        assert y.dtype == reference(*given_).dtype == torch.bfloat16
        seen = torch.autograd.grad(y.float().square().sum(), trained) if inside else None
    seen = seen or torch.autograd.grad(y.float().square().sum(), trained)
    wanted = torch.autograd.grad(reference(*given_).square().sum(), trained)
    for s, w in zip(seen, wanted, strict=True):
        assert s.dtype == w.dtype == torch.float32
        assert (s - w).norm() <= 0.03 * w.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_the_wanted_gradients_are_formed(kernel: str) -> None:
    """x of the first layer asks for none; frozen factors ask for none."""
    fast, reference = KERNELS[kernel]
    x, W, b, first, second = inputs(kernel, (3,), 6, 8, 2)
    (seen,) = torch.autograd.grad(fast(x.detach(), W, b, first, second).square().sum(), [second])
    (wanted,) = torch.autograd.grad(reference(x.detach(), W, b, first, second).square().sum(), [second])
    torch.testing.assert_close(seen, wanted)
    frozen = first.detach() if first.is_floating_point() else first
    (dx,) = torch.autograd.grad(fast(x, W, b, frozen, second.detach()).square().sum(), [x])
    (dx_wanted,) = torch.autograd.grad(reference(x, W, b, frozen, second.detach()).square().sum(), [x])
    torch.testing.assert_close(dx, dx_wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("leading", [(4,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_may_be_written_into(kernel: str, leading: tuple[int, ...], bias: bool) -> None:
    """As by the ReLU(inplace=True) that follows many a linear map."""
    fast, reference = KERNELS[kernel]
    given_ = inputs(kernel, leading, 5, 7, 3, bias)
    seen, wanted = gradients(lambda *g: fast(*g).relu_(), given_), gradients(lambda *g: reference(*g).relu(), given_)
    for s, w in zip(seen, wanted, strict=True):
        torch.testing.assert_close(s, w)


def test_scatter_adds_at_flat_positions_and_leaves_the_weight_alone() -> None:
    W = torch.arange(6.0).view(2, 3)
    before = W.clone()
    assert scatter(W, torch.tensor([1, 5]), torch.tensor([10.0, 20.0])).tolist() == [[0, 11, 2], [3, 4, 25]]
    assert scatter(W.T, torch.tensor([1]), torch.tensor([10.0])).tolist() == [[0, 13], [1, 4], [2, 5]]  # row-major in [out, in], however stored
    assert torch.equal(W, before)


def test_memory_kept_for_the_backward_pass() -> None:
    """LoRA keeps x, the thin product and the three weights; nothing of the output's size, no second copy of W for SHiRA."""
    for kernel, (fast, _) in KERNELS.items():
        x, W, b, first, second = inputs(kernel, (11,), 13, 17, 2)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            fast(x, W, b, first, second)
        own = [t for t in kept if t.data_ptr() not in {w.data_ptr() for w in (x, W, first, second)}]
        assert sum(t.numel() for t in own) <= 11 * 2, kernel  # the thin x A^T [11, 2] alone


@pytest.mark.parametrize("trained", ["A", "B"])
def test_x_is_kept_for_the_backward_pass_only_where_A_is_trained(trained: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: plan.PLANS[0])
    x, W, b, A, B = inputs("lora", (11,), 13, 17, 2)
    A, B = (factor.detach().requires_grad_(name == trained) for name, factor in (("A", A), ("B", B)))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = lora_linear(x, W, b, A, B)
    assert (x.data_ptr() in kept) == (trained == "A")
    assert_same(lambda *_: y, lambda *_: lora_linear_reference(x, W, b, A, B), (x, W, b, A, B), **EXACT)


# ---- several low-rank maps of one input -----------------------------------------------------------------------------------

SIZES = ((5, 2, True), (3, 1, False), (1, 4, True), (6, 3, False))  # outputs, rank, bias


def group(count: int, leading: tuple[int, ...] = (2, 3), width: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """x, then W, b, A, B of each map."""
    tensors: list[Tensor | None] = []
    for out, rank, bias in SIZES[:count]:
        x, *own = inputs("lora", leading, out, width, rank, bias, dtype)
        tensors += own
    return [x, *tensors]


def maps(tensors: tuple[Tensor | None, ...]) -> list[LowRankMap]:
    return [LowRankMap(*tensors[start : start + 4]) for start in range(0, len(tensors), 4)]  # type: ignore[arg-type]


def together(x: Tensor, *tensors: Tensor | None) -> Tensor:
    """All outputs in a row."""
    return torch.cat([y.flatten() for y in lora_linears(x, maps(tensors))])


def apart(x: Tensor, *tensors: Tensor | None) -> Tensor:
    return torch.cat([lora_linear_reference(x, *each).flatten() for each in maps(tensors)])


def assert_same(fast: Callable[..., Tensor], definition: Callable[..., Tensor], given_: Any, **tolerance: float) -> None:
    for seen, wanted in zip(gradients(fast, given_), gradients(definition, given_), strict=True):
        torch.testing.assert_close(seen, wanted, **tolerance)


EXACT = {"rtol": 1e-10, "atol": 1e-10}  # in fp64


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("leading", [(2, 3), (4,), (), (0,), (2, 0, 3)], ids=str)
def test_maps_of_one_input_equal_each_alone(count: int, leading: tuple[int, ...]) -> None:
    given_ = group(count, leading)
    assert_same(together, apart, given_, **EXACT)
    for y, each in zip(lora_linears(given_[0], maps(tuple(given_[1:]))), maps(tuple(given_[1:])), strict=True):  # type: ignore[arg-type]
        assert y.shape == (*leading, len(each.weight))


@pytest.mark.parametrize("used", [(0,), (1,), (3,), (0, 2), (1, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("chosen", plan.PLANS, ids=str)
def test_an_output_that_nobody_used_changes_nothing_for_the_others(used: tuple[int, ...], chosen: plan.Plan, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: chosen)
    x, *tensors = group(4)
    kept = [t for index in used for t in tensors[4 * index : 4 * index + 4]]

    def some(x: Tensor, *_: Tensor | None) -> Tensor:
        outputs = lora_linears(x, maps(tuple(tensors)))
        return torch.cat([outputs[index].flatten() for index in used])

    for seen, wanted in zip(gradients(some, (x, *kept)), gradients(apart, (x, *kept)), strict=True):
        torch.testing.assert_close(seen, wanted, **EXACT)
    unused = [t for index in range(4) if index not in used for t in tensors[4 * index + 2 : 4 * index + 4]]
    assert torch.autograd.grad(some(x).sum(), unused, allow_unused=True) == (None,) * len(unused)


PICK = list(product((False, True), repeat=3))  # whether x, A, B ask for gradients


@pytest.mark.parametrize("wanted", [pick for pick in PICK if any(pick)], ids=str)
@pytest.mark.parametrize("chosen", plan.PLANS, ids=str)
def test_every_order_of_products_gives_the_same_for_whatever_is_trained(wanted: tuple[bool, ...], chosen: plan.Plan, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: chosen)
    x, *tensors = group(3)
    given_ = [x, *tensors]
    for index, t in enumerate(given_):
        role = 0 if index == 0 else {3: 1, 0: 2}.get(index % 4)  # W, b, A, B follow x
        if t is not None and role is not None:
            t.requires_grad_(wanted[role])
    assert_same(together, apart, given_, **EXACT)


@pytest.mark.parametrize("chosen", plan.PLANS, ids=str)
@pytest.mark.parametrize("leading", [(2, 3), (0,)], ids=["rows", "no-rows"])
def test_every_order_of_products_passes_finite_differences(chosen: plan.Plan, leading: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: chosen)
    assert torch.autograd.gradcheck(together, group(3, leading))


def test_maps_of_one_input_may_follow_different_orders(monkeypatch: Any) -> None:
    """The thin products of some are stacked beside merged ones."""
    for orders in product((plan.Plan(), plan.Plan(True, False, True), plan.Plan(False, True, False)), repeat=3):
        queue = list(orders)
        monkeypatch.setattr(plan, "choose", lambda *_, queue=queue: queue.pop(0))
        seen = gradients(together, given_ := group(3))
        assert not queue
        for s, w in zip(seen, gradients(apart, given_), strict=True):
            torch.testing.assert_close(s, w, **EXACT)


@pytest.mark.parametrize("chosen", plan.PLANS, ids=str)
def test_maps_of_one_input_need_not_be_contiguous(chosen: plan.Plan, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: chosen)
    x, *tensors = group(3)
    x = torch.randn(7, 4, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    turned = [t if t is None or t.ndim == 1 else t.detach().T.contiguous().T.requires_grad_(t.requires_grad) for t in tensors]
    assert_same(together, apart, (x, *turned), **EXACT)
    trained = trained_in((x, *turned))
    for seen, wanted in zip(
        torch.autograd.grad(together(x, *turned).sum(), trained), torch.autograd.grad(apart(x, *turned).sum(), trained), strict=True
    ):
        torch.testing.assert_close(seen, wanted, **EXACT)


def test_outputs_of_maps_of_one_input_may_be_written_into() -> None:
    def doubled(x: Tensor, *tensors: Tensor | None) -> Tensor:
        first, second = lora_linears(x, maps(tensors))
        return torch.cat([first.relu_().flatten(), second.mul_(2).flatten()])

    def wanted(x: Tensor, *tensors: Tensor | None) -> Tensor:
        first, second = (lora_linear_reference(x, *each) for each in maps(tensors))
        return torch.cat([first.relu().flatten(), (second * 2).flatten()])

    assert_same(doubled, wanted, group(2), **EXACT)


def test_maps_of_one_input_in_low_precision() -> None:
    exact = group(3, dtype=torch.float32)
    low = [t if t is None or (t.requires_grad and t.ndim == 2) else t.detach().bfloat16().requires_grad_(t.requires_grad) for t in exact]
    for seen, wanted in zip(gradients(together, low), gradients(apart, exact), strict=True):
        assert (seen.float() - wanted).norm() <= 0.02 * wanted.norm()


# ---- norm, gate, rotation, attention, cross-entropy -----------------------------------------------------------------------

Sizes = tuple[int, int, int, int]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silu-module": torch.nn.SiLU(),
    "gelu": F.gelu,
    "tanh-gelu": lambda g: F.gelu(g, approximate="tanh"),
    "identity": lambda g: g,
    "relu": torch.relu,
    "relu-module": torch.nn.ReLU(),
}


class Random:
    """Numbers from one seed, fp64 rounded to ``dtype``."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


def norm_inputs(sizes: Sizes, random: Random) -> list[Any]:
    return [random(*sizes).requires_grad_(), random(sizes[-1]), 0.1]


def rotary_inputs(sizes: Sizes, random: Random) -> list[Any]:
    """Factors that are no angles: nothing may rely on two halves being equal."""
    batch, heads, length, half = sizes
    return [random(batch, heads, length, 2 * half).requires_grad_(), *(random(batch, 1, length, 2 * half) for _ in range(2))]


def attention_inputs(heads: int, mask: str) -> Callable[[Sizes, Random], list[Any]]:
    """``heads`` to a group; n positions on n + 2, values of another width than keys."""

    def make(sizes: Sizes, random: Random) -> list[Any]:
        batch, groups, n, d = sizes
        shape = {"none": None, "shared": (1, 1, n, n + 2), "rows": (batch, 1, n, n + 2), "heads": (batch, heads * groups, n, n + 2)}[mask]
        q, k, v = random(batch, heads * groups, n, d), random(batch, groups, n + 2, d), random(batch, groups, n + 2, d + 1)
        hidden = None if shape is None else random(*shape).masked_fill(torch.ones(n, n + 2).triu(1).bool(), torch.finfo(random.dtype).min)
        return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), hidden, 0.7]

    return make


def loss_inputs(sizes: Sizes, random: Random) -> list[Any]:
    rows, vocabulary = sizes[0] * sizes[1], sizes[2] + 2
    labels = torch.arange(rows) * 5 % vocabulary
    return [random(rows, sizes[3]).requires_grad_(), random(vocabulary, sizes[3]), labels]


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The definition in the inputs' own dtype (the reference rounds to fp32)."""
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")


# name -> call, definition, inputs of the given sizes, how many numbers it may keep for the backward pass beside its inputs
FUSED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[Sizes, Random], list[Any]], Callable[[Sizes], int]]] = {
    "norm": (rms_norm, rms_norm_reference, norm_inputs, lambda s: math.prod(s[:-1])),
    **{
        f"gate-{name}": (
            lambda g, u, act=act: gate(act, g, u),
            lambda g, u, act=act: gate_reference(act, g, u),
            lambda sizes, random: [random(*sizes).requires_grad_(), random(*sizes).requires_grad_()],
            lambda s: 0,
        )
        for name, act in ACTIVATIONS.items()
    },
    "rotate": (rotate, rotate_reference, rotary_inputs, lambda s: 0),
    **{
        f"attention-{heads}-heads-a-group-mask-{mask}": (
            attention,
            attention_reference,
            attention_inputs(heads, mask),
            lambda s, heads=heads: s[0] * heads * s[1] * s[2] * (s[2] + 2 + s[3] + 1),  # probabilities and output
        )
        for heads, mask in [(1, "none"), (1, "rows"), (2, "shared"), (3, "none"), (3, "rows"), (2, "heads")]
    },
    "cross-entropy": (linear_cross_entropy, summed_cross_entropy, loss_inputs, lambda s: s[0] * s[1] * s[3]),
}
every_fused = pytest.mark.parametrize("name", FUSED)
SMALL: Sizes = (2, 3, 4, 5)
TINY: Sizes = (2, 1, 3, 2)  # for finite differences, which run the call twice for each number


@every_fused
@settings(max_examples=15, deadline=None)
@given(sizes=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)))
def test_fused_values_and_gradients_equal_the_definition(name: str, sizes: Sizes) -> None:
    """Also without rows."""
    fast, definition, make, _ = FUSED[name]
    assert_same(fast, definition, make(sizes, Random(torch.float64)), **EXACT)


@every_fused
def test_fused_gradients_equal_finite_differences(name: str) -> None:
    fast, _, make, _ = FUSED[name]
    assert torch.autograd.gradcheck(fast, make(TINY, Random(torch.float64)))


@every_fused
def test_fused_calls_take_tensors_that_are_not_contiguous(name: str) -> None:
    fast, definition, make, _ = FUSED[name]

    def turned(t: Any) -> Any:
        """The same numbers, stored with the first and last dimension exchanged."""
        if not isinstance(t, Tensor) or t.ndim < 2:
            return t
        other = t.detach().transpose(0, -1).contiguous().transpose(0, -1)
        assert not other.is_contiguous() or 1 in (t.shape[0], t.shape[-1])
        return other.requires_grad_(t.requires_grad)

    given_ = [turned(t) for t in make(SMALL, Random(torch.float64))]
    assert_same(fast, definition, given_, **EXACT)


@every_fused
def test_fused_calls_take_an_expanded_gradient(name: str) -> None:
    fast, definition, make, _ = FUSED[name]
    given_ = make(SMALL, Random(torch.float64))
    seen, wanted = (torch.autograd.grad(function(*given_).sum(), trained_in(given_)) for function in (fast, definition))
    for s, w in zip(seen, wanted, strict=True):
        torch.testing.assert_close(s, w, **EXACT)


@every_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_calls_in_low_precision(name: str, dtype: torch.dtype) -> None:
    """y and the gradients have the dtype of the definition, and its values to the precision of that dtype."""
    fast, definition, make, _ = FUSED[name]
    low = make(SMALL, Random(dtype))
    exact = [t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t for t in low]
    seen, wanted = gradients(fast, low), gradients(definition, exact)
    assert seen[0].dtype == (torch.float32 if name == "cross-entropy" else dtype)
    assert [g.dtype for g in seen[1:]] == [t.dtype for t in trained_in(low)]
    for s, w in zip(seen, wanted, strict=True):
        assert (s.double() - w).norm() <= 4 * torch.finfo(dtype).eps * w.norm()


@every_fused
def test_fused_calls_form_only_the_wanted_gradients(name: str) -> None:
    """For each of the trained inputs alone: the others are frozen."""
    fast, definition, make, _ = FUSED[name]
    for index in range(len(trained_in(make(SMALL, Random(torch.float64))))):
        given_ = make(SMALL, Random(torch.float64))
        for other, t in enumerate(trained_in(given_)):
            t.requires_grad_(other == index)
        assert_same(fast, definition, given_, **EXACT)


@every_fused
def test_fused_calls_without_gradients(name: str) -> None:
    fast, definition, make, _ = FUSED[name]
    given_ = make(SMALL, Random(torch.float64))
    with torch.no_grad():
        y = fast(*given_)
    assert not y.requires_grad
    torch.testing.assert_close(y, definition(*given_).detach(), **EXACT)


def kept_beside(function: Callable[..., Any], given_: Any) -> int:
    """Bytes that ``function`` keeps for the backward pass beside what it was given; each piece of memory counts once."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in given_ if isinstance(t, Tensor)}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = function(*given_)  # noqa: F841  alive, so that no piece of memory is used twice
    return sum(size for at, size in kept.items() if at not in own)


@every_fused
def test_memory_that_fused_calls_keep_for_the_backward_pass(name: str) -> None:
    fast, _, make, numbers = FUSED[name]
    assert kept_beside(fast, make(SMALL, Random(torch.float64))) <= 8 * numbers(SMALL)


def test_memory_that_maps_of_one_input_keep_for_the_backward_pass() -> None:
    assert kept_beside(together, group(4)) <= 8 * 6 * sum(rank for _, rank, _ in SIZES)  # the thin product of 2 x 3 rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_torchs_own(dtype: torch.dtype) -> None:
    x, w, eps = norm_inputs(SMALL, Random(dtype))
    torch.testing.assert_close(rms_norm(x, w, eps), F.rms_norm(x, (x.shape[-1],), w, eps))


def test_the_norm_of_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    w = torch.arange(1.0, 6.0, dtype=torch.float64)
    (dx,) = torch.autograd.grad(rms_norm(x, w, 0.01).sum(), x)
    torch.testing.assert_close(dx, (w / 0.1).expand(2, 5), **EXACT)


def test_a_rotation_is_undone_by_the_opposite_angle() -> None:
    angle = torch.randn(2, 1, 4, 3, dtype=torch.float64).repeat(1, 1, 1, 2)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(x, angle.cos(), angle.sin()), angle.cos(), -angle.sin()), x, **EXACT)


@pytest.mark.parametrize("mask", ["none", "rows"])
def test_attention_is_torchs_own(mask: str) -> None:
    q, k, v, hidden, scale = attention_inputs(3, mask)(SMALL, Random(torch.float64))
    wanted = F.scaled_dot_product_attention(q, k, v, hidden, scale=scale, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, hidden, scale), wanted, **EXACT)


@pytest.mark.parametrize(("heads", "mask"), [(1, "none"), (3, "rows"), (2, "heads")])
def test_attention_with_dropout_is_the_definition_with_that_mask(heads: int, mask: str) -> None:
    given_ = attention_inputs(heads, mask)(SMALL, Random(torch.float64))

    def fast(*args: Any) -> Tensor:
        torch.manual_seed(3)
        return attention(*args, 0.4)

    def definition(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
        k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
        shares = (scale * q @ k.transpose(2, 3) + (0 if hidden is None else hidden)).softmax(-1)
        torch.manual_seed(3)
        kept, factor = draw(shares.shape, 0.4, shares.device)
        assert 0 < kept.sum() < kept.numel()
        return (shares * kept * factor) @ v

    assert_same(fast, definition, given_, **EXACT)
    assert torch.autograd.gradcheck(fast, attention_inputs(heads, mask)(TINY, Random(torch.float64)))


def test_attention_drops_its_probabilities_independently() -> None:
    """With the identity for values the output is the dropped probabilities themselves."""
    n, p = 64, 0.25
    q, k = torch.randn(3, 4, n, 8, dtype=torch.float64), torch.randn(3, 2, n, 8, dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64).expand(3, 2, n, n)
    plain, dropped = attention(q, k, eye, None, 0.3), attention(q, k, eye, None, 0.3, p)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / (1 - p))
    assert_share(kept, 1 - p)
    assert len({tuple(row.tolist()) for row in kept.view(-1, n)}) == 3 * 4 * n  # no two rows have the same mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_under_autocast(dtype: torch.dtype, p: float) -> None:
    """fp32 queries beside bf16 values, as after a rotation by fp32 angles: computes in bf16, gradients in each input's dtype."""
    q, k, v, hidden, scale = attention_inputs(2, "rows")(SMALL, Random(torch.float32))
    low = v.detach().to(dtype).requires_grad_()

    def run(values: Tensor, autocast: bool) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = attention(q, k, values, hidden, scale, p)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [q, k, values])]

    seen, wanted = run(low, True), run(v, False)
    assert [t.dtype for t in seen] == [torch.bfloat16, torch.float32, torch.float32, dtype]
    for s, w in zip(seen, wanted, strict=True):
        assert (s.float() - w).norm() <= 0.03 * w.norm()


@pytest.mark.parametrize("block", [1, 6, 7, 20, 32, 33, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_cross_entropy_whatever_the_blocks_of_the_vocabulary(block: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    """3 rows on 11 words in blocks of 1, 2, 6, 10 and 11; labels in the first, the last and a middle one."""
    monkeypatch.setattr(cross_entropy, "BLOCK", block)
    random = Random(dtype)
    hidden, weight, labels = random(3, 5).requires_grad_(), random(11, 5), torch.tensor([0, 10, 5])
    exact = [hidden.detach().double().requires_grad_(), weight.double(), labels]
    seen, wanted = gradients(linear_cross_entropy, (hidden, weight, labels)), gradients(summed_cross_entropy, exact)
    for s, w in zip(seen, wanted, strict=True):
        torch.testing.assert_close(s.double(), w, rtol=0, atol=4 * torch.finfo(dtype).eps * float(w.abs().max()))


def test_cross_entropy_is_its_reference() -> None:
    given_ = loss_inputs(SMALL, Random(torch.float32))
    assert_same(linear_cross_entropy, linear_cross_entropy_reference, given_)


@pytest.mark.parametrize("block", [4, 10**6])
@pytest.mark.parametrize("sign", [1, -1])
def test_cross_entropy_of_huge_logits_does_not_overflow(block: int, sign: int, monkeypatch: Any) -> None:
    """Logits of +-1e4, rising and falling over the vocabulary, so that the running maximum changes in some rows and not in others."""
    monkeypatch.setattr(cross_entropy, "BLOCK", block)
    hidden = (sign * torch.tensor([[100.0], [-100.0]])).requires_grad_()
    weight = torch.linspace(-100, 100, 7)[:, None]
    labels = torch.tensor([0, 3])
    exact = [hidden.detach().double().requires_grad_(), weight.double(), labels]
    for s, w in zip(gradients(linear_cross_entropy, (hidden, weight, labels)), gradients(summed_cross_entropy, exact), strict=True):
        assert s.isfinite().all()
        torch.testing.assert_close(s.double(), w, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_multiple_of_the_cross_entropy_has_that_multiple_of_its_gradient(dtype: torch.dtype) -> None:
    hidden, weight, labels = loss_inputs(SMALL, Random(dtype))
    (once,), (thrice,) = (torch.autograd.grad(c * linear_cross_entropy(hidden, weight, labels), hidden) for c in (1, 3))
    torch.testing.assert_close(thrice, 3 * once)


class Largest(TorchDispatchMode):
    """The most numbers in one new piece of memory."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known, self.numbers = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for t in tree_leaves(outputs):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_never_holds_the_logits(dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK", 500)
    random = Random(dtype)
    hidden, weight = random(40, 3).requires_grad_(), random(1000, 3)
    with Largest([hidden, weight]) as largest:
        linear_cross_entropy(hidden, weight, torch.arange(40)).backward()
    assert 40 * 3 <= largest.numbers <= 500  # not 40 x 1000
    assert kept_beside(linear_cross_entropy, (hidden, weight, torch.arange(40))) == 40 * 3 * dtype.itemsize


def test_cross_entropy_under_autocast() -> None:
    """As for the other calls: products in bf16, gradients in fp32."""
    hidden, weight, labels = loss_inputs((3, 4, 9, 8), Random(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        seen = linear_cross_entropy(hidden, weight, labels)
    exact = linear_cross_entropy_reference(hidden, weight, labels)
    (found,), (wanted,) = torch.autograd.grad(seen, hidden), torch.autograd.grad(exact, hidden)
    assert seen.dtype == found.dtype == torch.float32
    torch.testing.assert_close(seen, exact, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    assert (found - wanted).norm() <= 0.03 * wanted.norm()


# ---- dropout --------------------------------------------------------------------------------------------------------------


def assert_share(kept: Tensor, keep: float) -> None:
    """As many as a Bernoulli variable of mean ``keep`` gives, within five standard deviations."""
    assert abs(kept.double().mean().item() - keep) <= 5 * math.sqrt(keep * (1 - keep) / kept.numel())


@pytest.mark.parametrize("p", [0.0, 1e-6, 1e-4, 0.05, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dropout_keeps_its_share_and_scales_by_it(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(401, 1001, dtype=dtype), p)
    assert y.dtype == dtype
    assert_share(y != 0, 1 - p)
    assert y.unique().tolist() == [*([0.0] if (y == 0).any() else []), torch.tensor(1 / (1 - round(p * STEPS) / STEPS), dtype=dtype).item()]


def test_dropout_drops_neighbours_independently() -> None:
    """Four neighbours come from one random number."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(400_000, dtype=torch.float64), 0.3) != 0).double() - 0.7
    for lag in (1, 2, 3, 4):
        assert abs((kept[lag:] * kept[:-lag]).mean()) <= 5 * 0.21 / math.sqrt(len(kept))


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (5,), (3, 7), (2, 0, 3), (2, 3, 11)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_gradient_of_dropout_has_the_mask_of_its_output(shape: tuple[int, ...], p: float) -> None:
    x = torch.rand(shape, dtype=torch.float64).add_(1).requires_grad_()
    torch.manual_seed(0)
    y = dropout(x, p)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p), y)
    assert y.shape == shape
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx * x, y, **EXACT)  # linear without a constant
    assert p or torch.equal(y, x)


def test_dropout_draws_anew_at_every_call() -> None:
    x = torch.ones(64)
    assert not torch.equal(dropout(x, 0.5), dropout(x, 0.5))


def test_memory_that_dropout_keeps_is_one_byte_an_element() -> None:
    x = torch.ones(8, 125, requires_grad=True)
    assert kept_beside(lambda x: dropout(x, 0.5), [x]) == 1000


def test_dropout_of_a_transposed_tensor_with_an_expanded_gradient() -> None:
    x = torch.rand(6, 5, dtype=torch.float64).T.requires_grad_()
    y = dropout(x, 0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx * x, y, **EXACT)


def test_a_gated_input_is_formed_again_instead_of_kept() -> None:
    """What a fused map reads from a gate is not kept, unless it was written to since; the gradients are autograd's either way."""
    g, u = (torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (1, 2))
    _, W, b, A, B = inputs("lora", (3, 4), 5, 7, 2)
    for act in (torch.nn.SiLU(), torch.nn.GELU()):
        for written in (False, True):
            kept: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
                h = gate(act, g, u)
                if written:
                    h.mul_(2)
                y = lora_linear(h, W, b, A, B)
            assert (h.data_ptr() in {t.data_ptr() for t in kept}) == written
            definition = lora_linear_reference(act(g) * u * (2 if written else 1), W, b, A, B)
            trained = [g, u, A, B]
            probe = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
            for seen, wanted in zip(
                torch.autograd.grad((y * probe).sum(), trained), torch.autograd.grad((definition * probe).sum(), trained), strict=True
            ):
                torch.testing.assert_close(seen, wanted)
