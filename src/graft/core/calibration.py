"""The calibration service: activations, covariances and full gradients of a frozen model, streamed over a few batches.

Everything that looks at data before training asks here, so that hooks, masks, modes and memory are right once. The model runs
in eval mode and is left as it was found; no gradient ever lands on a base parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from graft.core.errors import GraftError
from graft.core.progress import followed
from graft.core.target import Target

Batch: TypeAlias = Mapping[str, Any]
Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise GraftError("the calibration batches give no loss; add 'labels' to each batch or pass loss=a function of (model, batch).")
    return loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Calibration:
    """A model with a few batches (mappings of keyword arguments) to look at before training."""

    def __init__(self, model: nn.Module, batches: Iterable[Batch], loss: Loss | None = None):
        self.model, self.loss = model, loss or model_loss
        self.batches = list(batches)
        if not self.batches:
            raise GraftError("calibration holds no batch; pass at least one.")

    # ---- activations ------------------------------------------------------------------------------------------------

    def inputs(self, targets: Sequence[Target], consume: Callable[[Target, Tensor], bool | None], labelled: bool = True) -> None:
        """One pass: hands each target's inputs, ``[n, in]`` a batch, to ``consume``; stops early once it returned True for all.

        Padding never counts; with ``labelled`` only the positions with a label (not -100) do, where there are such labels.
        """
        waiting = {target.name for target in targets}
        for batch in followed(self.batches, "calibrating"):
            if not waiting:
                return
            mask = _token_mask(batch, labelled)

            def hear(target: Target, mask: Tensor | None = mask) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
                def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    if consume(target, _rows(target, args[0].detach(), mask)):
                        waiting.discard(target.name)

                return hook

            with evaluating(self.model), torch.no_grad(), ExitStack() as hooks:
                for target in targets:
                    if target.name in waiting:
                        hooks.enter_context(_removing(target.module.register_forward_pre_hook(hear(target))))
                self.model(**_on_device(self.model, batch))

    def groups(self, targets: Sequence[Target]) -> list[list[Target]]:
        """Targets that read the same input tensor (q, k and v of a block), found on the first batch; in the model's order."""
        seen: dict[tuple[int, int, torch.Size], list[Target]] = {}
        alive: list[Tensor] = []  # keeps the tensors, so that no address is used twice

        def hear(target: Target) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                alive.append(args[0])
                seen.setdefault((args[0].data_ptr(), args[0]._version, args[0].shape), []).append(target)

            return hook

        with evaluating(self.model), torch.no_grad(), ExitStack() as hooks:
            for target in targets:
                hooks.enter_context(_removing(target.module.register_forward_pre_hook(hear(target))))
            self.model(**_on_device(self.model, self.batches[0]))
        return list(seen.values())

    def covariances(self, targets: Sequence[Target], labelled: bool = False) -> dict[str, Tensor]:
        """The uncentred second moment ``X^T X / n [in, in]`` of each target's inputs, fp32."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def consume(target: Target, rows: Tensor) -> None:
            gram = rows.float().T @ rows.float()
            sums[target.name] = sums[target.name] + gram if target.name in sums else gram
            counts[target.name] = counts.get(target.name, 0) + len(rows)

        self.inputs(targets, consume, labelled)
        return {name: gram / max(counts[name], 1) for name, gram in sums.items()}

    # ---- gradients --------------------------------------------------------------------------------------------------

    def gradients(self, targets: Sequence[Target], memory: int = 2 << 30) -> Iterator[tuple[Target, Tensor]]:
        """The full gradient ``dL/dW [out, in]`` of each target, the mean over the batches, fp32 on the CPU.

        Streams over the blocks: at most ``memory`` bytes of gradients are held, with one more pass over the batches for each
        further portion, so the gradient of the whole model never exists.
        """
        portion: list[Target] = []
        used = 0
        for target in targets:
            size = 4 * target.shape[0] * target.shape[1]
            if portion and used + size > memory:
                yield from self._gradients(portion).items()
                portion, used = [], 0
            portion.append(target)
            used += size
        yield from self._gradients(portion).items()

    def _gradients(self, targets: Sequence[Target]) -> dict[Target, Tensor]:
        sums = {target: torch.zeros(target.shape) for target in targets}
        probes: list[Tensor] = []  # a zero added to each output: asking for their gradients alone keeps every .grad untouched

        def hear(target: Target) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
                x = args[0].detach()
                probes.append(y.new_zeros((), requires_grad=True))
                y = y + probes[-1]

                def accumulate(gradient: Tensor) -> None:
                    sums[target] += _weight_gradient(target, x, gradient.detach()).to("cpu", torch.float32)

                y.register_hook(accumulate)  # type: ignore[no-untyped-call]
                return y

            return hook

        for batch in followed(self.batches, "calibrating"):
            with evaluating(self.model), torch.enable_grad(), ExitStack() as hooks:
                for target in targets:
                    hooks.enter_context(_removing(target.module.register_forward_hook(hear(target))))
                loss = self.loss(self.model, _on_device(self.model, batch))
                if probes:
                    torch.autograd.grad(loss, probes, allow_unused=True)  # what the loss does not read has gradient zero
            probes.clear()
        return {target: total / len(self.batches) for target, total in sums.items()}


def _weight_gradient(target: Target, x: Tensor, gradient: Tensor) -> Tensor:
    if not target.pointwise:
        raise GraftError(f"{target} has no full gradient here: grouped convolutions and norms are left out; narrow the targets.")
    if target.kind == "conv2d":
        gradient = gradient.flatten(2).transpose(1, 2)
    rows = gradient.reshape(-1, gradient.shape[-1]).float()
    if target.kind == "embedding":
        table = torch.zeros(target.shape[1], target.shape[0], device=rows.device).index_add_(0, x.reshape(-1), rows)
        padding = getattr(target.module, "padding_idx", None)
        if padding is not None:  # torch never trains this row
            table[padding] = 0
        return table.T
    return rows.T @ target.rows(x).float()


def _token_mask(batch: Batch, labelled: bool) -> Tensor | None:
    labels, attention = batch.get("labels"), batch.get("attention_mask")
    present = attention.bool() if isinstance(attention, Tensor) else None
    if labelled and isinstance(labels, Tensor) and labels.ndim == 2 and bool((labels == -100).any()):
        labelled_ones = labels != -100
        return labelled_ones & present if present is not None and present.shape == labels.shape else labelled_ones
    return present


def _rows(target: Target, x: Tensor, mask: Tensor | None) -> Tensor:
    rows = target.rows(x)
    positions = x.shape if target.kind == "embedding" else x.shape[:-1]
    if mask is not None and (positions == mask.shape or positions == (mask.numel(),)):  # some models flatten batch and length
        rows = rows[mask.reshape(-1).to(rows.device)]
    return rows


def _on_device(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
