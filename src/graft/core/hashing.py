"""Hashes: which base an adapter belongs to, and which bits it is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn

from graft.core.errors import GraftError
from graft.core.target import SLOT

CHUNK = 1 << 20  # values that are rounded at a time, so that they are still in the cache when they are hashed

_fingerprints: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds only a part of the tensor (a DTensor, whose class would cost a slow import)."""
    return hasattr(tensor, "placements")


def is_whole(model: nn.Module) -> bool:
    """Whether this process holds the values of every parameter."""
    return not any(is_sharded(parameter) or parameter.is_meta for parameter in model.parameters())


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """A hash of the base model's parameters (names, shapes, values rounded to bf16, so that fp32 and bf16 copies agree).

    XXH3-128: it tells models apart and is no defence against somebody who makes two agree on purpose. ``without`` are modules that an
    adapter brings itself. Deltas do not count. Raises :class:`GraftError` for a sharded base.
    """
    skipped = tuple(without)
    parameters = [
        (name, p)
        for name, p in model.named_parameters()
        if f".{SLOT}." not in f".{name}" and not any(f".{module}." in f".{name}" for module in skipped)
    ]
    state = (skipped, *((id(p), p._version, p.data_ptr()) for _, p in parameters))
    cached = _fingerprints.get(model)
    if cached and cached[0] == state:
        return cached[1]
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(parameters):
        if is_sharded(parameter):
            raise GraftError(
                f"{name} is sharded over processes, so the base has no fingerprint here; set adapter.fingerprint = fingerprint(model) "
                "before sharding it, as graft.training.distributed.shard does."
            )
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for values in torch.split(parameter.detach().reshape(-1), CHUNK):
            digest.update(values.to(torch.bfloat16).cpu().view(torch.int16).numpy().data)
    _fingerprints[model] = (state, digest.hexdigest())
    return digest.hexdigest()


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of an adapter's tensors: names, shapes, dtypes and bits. Cache keys in service carry it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
