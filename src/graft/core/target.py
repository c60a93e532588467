"""Targets: the linear maps of a base model that can be adapted, each seen as ``W [out, in]``.

A target hides how its module stores the weight, so that a delta is written once for all of them:

==========  ======================  ==========================  =========================
kind        module                  stored                      seen as W [out, in]
==========  ======================  ==========================  =========================
linear      ``nn.Linear``           [out, in]                   itself
conv1d      GPT-2's ``Conv1D``      [in, out]                   transposed
conv2d      ``nn.Conv2d``           [out, in/groups, kh, kw]    [out, in/groups * kh * kw]
embedding   ``nn.Embedding``        [vocabulary, dim]           transposed: [dim, vocabulary]
norm        layer and RMS norms     [dim]                       [dim, 1]
==========  ======================  ==========================  =========================

Nothing else in Graft touches ``.weight`` of a base module, and base tensors are never written to.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.core.errors import GraftError, nearest

SLOT = "graft"  # name of the child module that holds the deltas of a target
LINEAR_KINDS = ("linear", "conv1d", "conv2d")
KINDS = (*LINEAR_KINDS, "embedding", "norm")

# The end of a module's path tells its role; the first pattern that matches counts.
_ROLES = [
    ("head", r"(lm_head|classifier|score|embed_out|cls\.predictions\.decoder|heads?|classification_head)(\..+)?"),
    ("qkv", r"(c_attn|qkv|qkv_proj|query_key_value|in_proj|Wqkv)"),
    ("q", r"(q_proj|query|q_lin|q|to_q)"),
    ("k", r"(k_proj|key|k_lin|k|to_k)"),
    ("v", r"(v_proj|value|v_lin|v|to_v)"),
    ("o", r"(o_proj|out_lin|(self_attn|attn|attention|self_attention)\.(out_proj|c_proj|proj|dense|o)|attention\.output\.dense|to_out(\.0)?)"),
    ("gate", r"(gate_proj|w1|wi_0)"),
    ("up", r"(up_proj|fc1|fc_in|c_fc|w3|wi|wi_1|lin1|intermediate\.dense|dense_h_to_4h|linear1)"),
    ("down", r"(down_proj|fc2|fc_out|w2|wo|lin2|output\.dense|mlp\.c_proj|dense_4h_to_h|linear2)"),
]
ROLE_GROUPS = {
    "attention": ("q", "k", "v", "o", "qkv"),
    "mlp": ("gate", "up", "down"),
}
# These modules read their children's weights without calling them, so a delta inside would be silently ignored.
_BYPASS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Target:
    """One adaptable map of the base model.

    Attributes: ``name`` (path in the model), ``module``, ``kind`` (see the module's table), ``role`` (q, k, v, o, qkv, gate,
    up, down, head, embedding, norm, conv or other), ``depth`` (index of its block, None outside the blocks), ``shape``
    (out, in) of the weight as a matrix.
    """

    def __init__(self, name: str, module: nn.Module, kind: str):
        self.name, self.module, self.kind = name, module, kind
        self.depth = _depth(name)
        self.role = _role(name, kind)
        out_features, in_features = self.view(self.original).shape
        self.shape: tuple[int, int] = (out_features, in_features)

    def __repr__(self) -> str:
        return f"Target({self.name}, {self.kind} {self.role}, {self.shape[0]} x {self.shape[1]})"

    @property
    def original(self) -> Tensor:
        """The base weight in the module's own layout, read-only."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    # ---- the weight -------------------------------------------------------------------------------------------------

    def view(self, stored: Tensor) -> Tensor:
        """A tensor in the module's own layout, seen as ``[out, in]`` (no copy)."""
        if self.kind in ("conv1d", "embedding"):
            return stored.T
        if self.kind == "norm":
            return stored.reshape(-1, 1)
        return stored.flatten(1)

    def stored(self, weight: Tensor) -> Tensor:
        """A matrix ``[out, in]`` in the module's own layout: the inverse of :meth:`view`."""
        if self.kind in ("conv1d", "embedding"):
            return weight.T
        return weight.reshape(self.original.shape)

    def weight(self) -> Tensor:
        """The base weight ``[out, in]``, read-only."""
        return self.view(self.original)

    @property
    def bias(self) -> Tensor | None:
        """The base bias ``[out]``, read-only."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype new parameters take here: fp32 beside a low-precision base, fp64 beside an fp64 one."""
        return torch.promote_types(self.weight().dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.weight().device

    @property
    def bytes(self) -> int:
        """Bytes that the base weight takes in memory."""
        weight = self.weight()
        return weight.numel() * weight.element_size()

    # ---- the map ----------------------------------------------------------------------------------------------------

    @property
    def pointwise(self) -> bool:
        """Whether the map splits into ``apply(x, A)`` followed by ``mix(h, B)``; grouped convolutions and norms do not."""
        return self.kind != "norm" and getattr(self.module, "groups", 1) == 1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """This map with another matrix ``weight [any out, in]`` in the place of W; computes in the base's dtype.

        ``x`` is ``[..., in]`` (linear, conv1d), ``[batch, channels, height, width]`` (conv2d) or ids (embedding).
        """
        if self.kind == "embedding":
            table = self.module
            assert isinstance(table, nn.Embedding)
            return F.embedding(x, weight.T, table.padding_idx).to(table.weight.dtype)
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if self.kind == "conv2d":
            conv = self.module
            assert isinstance(conv, nn.Conv2d)
            kernel = weight.reshape(weight.shape[0], *conv.weight.shape[1:])
            if conv.padding_mode != "zeros":
                x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
                return F.conv2d(x, kernel, bias, conv.stride, 0, conv.dilation, conv.groups)
            return F.conv2d(x, kernel, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if self.kind == "norm":
            raise GraftError(f"{self.name} is a norm; only a full copy (method 'full') can adapt it.")
        return F.linear(x, weight, bias)

    def mix(self, h: Tensor, weight: Tensor) -> Tensor:
        """A linear map on the output channels: ``h [..., r]`` (``[batch, r, ...]`` for conv2d) times ``weight [any, r]``."""
        weight = weight.to(h.dtype)
        if self.kind == "conv2d":
            return F.conv2d(h, weight[:, :, None, None])
        return F.linear(h, weight)

    def scale(self, h: Tensor, gains: Tensor) -> Tensor:
        """Each channel of an input or output of this map times its gain ``[channels]``; a gain near one is not rounded to h's dtype."""
        return (h * (gains[:, None, None] if self.kind == "conv2d" else gains)).to(h.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """The inputs of the map as vectors ``[n, in]``, one for each position."""
        if not self.pointwise:
            raise GraftError(f"{self} has no single input for all of its outputs: grouped convolutions and norms are left out; narrow the targets.")
        if self.kind == "conv2d":
            conv = self.module
            assert isinstance(conv, nn.Conv2d)
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
            patches = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)
            return patches.transpose(1, 2).flatten(0, 1)
        if self.kind == "embedding":
            return F.one_hot(x.reshape(-1), self.shape[1]).to(self.dtype)
        return x.reshape(-1, x.shape[-1])

    def clone_module(self, weight: Tensor | None = None) -> nn.Module:
        """A free-standing trainable copy of the module: own parameters, no deltas, no hooks.

        ``weight`` [out, in] takes the place of W, rounded to its dtype; its memory becomes the copy's where dtype and layout allow it.
        """
        clone = copy.copy(self.module)
        clone.__dict__.pop("forward", None)
        clone._modules = {}
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            setattr(clone, hooks, OrderedDict())
        own = {name: value.detach() for name, value in self.module._parameters.items() if value is not None}
        if weight is not None:
            own["weight"] = self.stored(weight).to(own["weight"].dtype).contiguous()
        copies = {name: value if weight is not None and name == "weight" else value.clone() for name, value in own.items()}
        clone._parameters = {name: nn.Parameter(copies[name]) if name in copies else None for name in self.module._parameters}
        clone._buffers = {name: None if value is None else value.clone() for name, value in self.module._buffers.items()}
        return clone


def kind_of(module: nn.Module) -> str | None:
    """The kind of target a module is, or None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    for base, kind in ((nn.Linear, "linear"), (nn.Conv2d, "conv2d"), (nn.Embedding, "embedding")):
        # A subclass with a forward of its own (scaled embeddings, quantised linears) computes something else.
        if isinstance(module, base):
            return kind if type(module).forward is base.forward and getattr(module, "max_norm", None) is None else None
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:
        return "conv1d"
    if "norm" in type(module).__name__.lower() and weight.ndim == 1:
        return "norm"
    return None


def all_targets(model: nn.Module) -> list[Target]:
    """Every module of the model that Graft can adapt, in the model's order."""
    bypassed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, _BYPASS))
    found = []
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind and name and f".{SLOT}." not in f".{name}." and not f"{name}.".startswith(bypassed or ("\0",)):
            found.append(Target(name, module, kind))
    return found


TargetSpec: TypeAlias = str | Iterable[str] | Callable[[Target], bool]


def find_targets(model: nn.Module, spec: TargetSpec = "linear", kinds: Iterable[str] = KINDS) -> list[Target]:
    """The targets that ``spec`` names.

    ``spec`` is a callable on a :class:`Target`, or one or several of: role names (``"attention"``, ``"mlp"``, ``"q"``,
    ``"embedding"``, ``"norm"``, ``"head"`` ...), ``"linear"`` (all linear maps of the blocks), ``"all"``, and glob patterns
    over paths (``"*.layers.3.*"``, ``"q_proj"``: a pattern also matches the last parts of a path).

    Raises :class:`GraftError` when a part of ``spec`` matches nothing, with what the model has.
    """
    candidates = all_targets(model)
    kinds = tuple(kinds)
    if callable(spec):
        chosen = {target.name for target in candidates if spec(target)}
    else:
        chosen = set()
        for pattern in [spec] if isinstance(spec, str) else list(spec):
            names = {target.name for target in candidates if _matches(target, pattern, candidates)}
            if not names:
                raise GraftError(_nothing_matched(model, pattern, candidates))
            chosen |= names
    found = [target for target in candidates if target.name in chosen]
    if not found:
        raise GraftError(_nothing_matched(model, "the given function", candidates))
    usable = [target for target in found if target.kind in kinds]
    if not usable:
        raise GraftError(f"this method adapts {', '.join(kinds)} modules, but the targets found are {found[0]} and {len(found) - 1} more.")
    if isinstance(spec, str) and _is_role(spec):
        return usable  # a role is a wish for all of its maps that the method can adapt
    if len(usable) < len(found):
        refused = next(target for target in found if target.kind not in kinds)
        raise GraftError(f"{refused} was asked for, but this method adapts only {', '.join(kinds)} modules; narrow the targets.")
    return found


def _is_role(pattern: str) -> bool:
    return pattern in ("linear", "all", "embedding", "norm", "conv", "head", *ROLE_GROUPS, *(role for role, _ in _ROLES))


def _matches(target: Target, pattern: str, candidates: list[Target]) -> bool:
    if pattern == "all":
        return True
    if pattern == "linear":
        if target.kind not in LINEAR_KINDS or target.role == "head":
            return False
        blocks_exist = any(other.depth is not None and other.kind in LINEAR_KINDS for other in candidates)
        return target.depth is not None or not blocks_exist
    if _is_role(pattern):
        return target.role in ROLE_GROUPS.get(pattern, (pattern,))
    return fnmatchcase(target.name, pattern) or fnmatchcase(target.name, f"*.{pattern}")


def _nothing_matched(model: nn.Module, pattern: str, candidates: list[Target]) -> str:
    if not candidates:
        return f"{type(model).__name__} holds no linear map, convolution, embedding or norm that could be adapted."
    for name, module in model.named_modules():
        if isinstance(module, _BYPASS) and any(fnmatchcase(f"{name}.{child}", f"*{pattern}") for child, _ in module.named_modules()):
            kind = type(module).__name__
            return f"{pattern!r} lies inside {name} ({kind}), which reads its weights without calling its children: a delta there would do nothing."
    leaves = sorted({target.name.rsplit(".", 1)[-1] for target in candidates})
    roles = sorted({target.role for target in candidates} | {"linear", "all"})
    return (
        f"no target of {type(model).__name__} matches {pattern!r}; {nearest(pattern, [*leaves, *roles, *(t.name for t in candidates)])} "
        f"The model has {len(candidates)} targets: modules {', '.join(leaves[:16])}; roles {', '.join(roles)}."
    )


def _depth(name: str) -> int | None:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else None


def _role(name: str, kind: str) -> str:
    if kind in ("embedding", "norm"):
        return kind
    for role, pattern in _ROLES:
        if re.fullmatch(rf"(.*\.)?{pattern}", name):
            return role
    return "conv" if kind == "conv2d" else "other"
