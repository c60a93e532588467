"""The fused linear maps against their one-line definitions: values and gradients, for every shape and dtype they meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graft.kernels.lora import lora_linear, lora_linear_reference
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


def gradients(function: Callable[..., Tensor], given: Inputs) -> list[Tensor]:
    """The output and the gradients of everything that is trained, for a loss whose gradient differs at each output."""
    y = function(*given)
    trained = [t for t in given if t is not None and t.requires_grad]
    probe = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
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
