"""Runs the frozen parts of a transformers model by fused kernels: norms, gated MLPs, rotary positions, attention, dropout, head and loss.

Only the ``forward`` of single module instances is answered differently; tensors, classes and paths stay, and :meth:`Fused.undo` gives
everything back. No list of architectures: each part is recognised by its shape and tried out on random numbers against what the module
itself answers, and at the end the whole model is compared. What does not agree is left as it is.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, wraps
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from graft.core.calibration import evaluating
from graft.core.errors import GraftError
from graft.core.target import SLOT
from graft.data.encoding import IGNORED
from graft.kernels.attention import attention
from graft.kernels.cross_entropy import linear_cross_entropy
from graft.kernels.dropout import STEPS, dropout
from graft.kernels.gate import gate
from graft.kernels.norm import rms_norm
from graft.kernels.rotary import rotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "graft"  # our name in transformers' table of attention functions
SHORT = 512  # positions up to which attention by plain products is faster than torch's on a CPU, where either pays at all
LOUD = 100.0  # the largest logit at which losses are compared
LOSS_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "num_items_in_batch", "use_cache"}


class Fused:
    """What was fused on a model: ``parts``, how many of each kind."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.parts: Counter[str] = Counter()
        self._replaced: list[tuple[nn.Module, MethodType]] = []  # each with the forward it has now
        self._attention: str | None = None

    def replace(self, kind: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Lets ``forward(module, ...)`` answer for ``module``; bound to it, so that a deep copy answers for itself."""
        bound = MethodType(forward, module)
        self._replaced.append((module, bound))
        module.forward = bound
        self.parts[kind] += 1

    def use_attention(self) -> None:
        """Lets our function choose how attention is computed."""
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self._attention = self.model.config._attn_implementation
        self.model.config._attn_implementation = ATTENTION
        self.parts["attention"] = 1

    def undo(self) -> None:
        """Gives every module its own ``forward`` back."""
        for module, ours in self._replaced:
            slot = module._modules.get(SLOT)
            if module.__dict__.get("forward") is ours:
                del module.__dict__["forward"]
            elif slot is not None:  # an adapter was attached meanwhile: it runs the module's own again
                slot.base, slot.replaced = type(module).forward.__get__(module), None
        if self._attention is not None:
            self.model.config._attn_implementation = self._attention
        self._replaced, self._attention, self.parts = [], None, Counter()


def fuse(model: PreTrainedModel) -> Fused:
    """Fuses what can be fused on ``model``, before or after :func:`graft.attach`; its function stays the same up to rounding.

    Dropout draws other random numbers than torch's. While training, a causal model that is given labels returns its loss and no logits
    (they are never formed); without labels, or in eval mode, it answers as always. The fused parts must be frozen: a norm or head whose
    weight asks for a gradient runs as it did. A module that an adapter, another library or an earlier call answers for is left alone.
    """
    if model.config.is_encoder_decoder or "input_ids" not in inspect.signature(model.forward).parameters:
        raise GraftError(f"{type(model).__name__} does not run on token ids alone, so what was fused could not be compared; use it as it is.")
    fused = Fused(model)
    probe = _Probe(model)
    before = probe.answer()
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        for kind, make in (("norm", _norm), ("gated MLP", _gated), ("rotary", _rotary), ("dropout", _dropout)):
            forward = make(module)
            if forward is not None:
                fused.replace(kind, module, forward)
    if model.config._attn_implementation == "sdpa":
        fused.use_attention()
    if not probe.agrees(before, probe.answer()):
        fused.undo()
    loss = _loss(model)
    if loss is not None and probe.same_loss():
        fused.replace("loss", model, loss)
    return fused


# ---- the parts --------------------------------------------------------------------------------------------------------------


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to the rounding of a few operations in their dtype; not a number agrees with nothing."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return bool((found - wanted).abs().max() <= 8 * torch.finfo(wanted.dtype).eps * wanted.abs().max())


def _random(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


@torch.no_grad()
def _norm(module: nn.Module) -> Callable[..., Any] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    x, plain = _random(3, len(weight), like=weight), type(module).forward
    if not _close(rms_norm(x, weight, eps), module.forward(x)):
        return None

    def forward(module: Any, x: Tensor) -> Any:
        return plain(module, x) if module.weight.requires_grad else rms_norm(x, module.weight, eps)

    return forward


@torch.no_grad()
def _gated(module: nn.Module) -> Callable[..., Any] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(module, "act_fn", None)
    if not all(isinstance(part, nn.Linear) for part in parts) or not callable(act):
        return None
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        return None

    def forward(module: Any, x: Tensor) -> Tensor:
        y: Tensor = module.down_proj(gate(module.act_fn, module.gate_proj(x), module.up_proj(x)))
        return y

    x = _random(3, parts[0].in_features, like=parts[0].weight)  # type: ignore[union-attr, arg-type]
    return forward if _close(forward(module, x), module.forward(x)) else None


def _rotary(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own code, with another function under the name of the one that rotates."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get("apply_rotary_pos_emb")
    if plain is None or not _rotates(plain):
        return None

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        if rest or options or not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            return plain(q, k, cos, sin, *rest, **options)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    names = {**forward.__globals__, "apply_rotary_pos_emb": rotated}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


@torch.no_grad()
def _rotates(plain: Callable[..., Any]) -> bool:
    one = torch.ones(())
    q, k, angle = _random(2, 3, 5, 8, like=one), _random(2, 1, 5, 8, like=one), _random(2, 5, 4, like=one).repeat(1, 1, 2)
    try:
        wanted = plain(q, k, angle.cos(), angle.sin())
    except (TypeError, RuntimeError):  # another signature
        return False
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return all(_close(rotate(x, cos, sin), y) for x, y in zip((q, k), wanted, strict=True))


def _dropout(module: nn.Module) -> Callable[..., Any] | None:
    if type(module) is not nn.Dropout or module.inplace or round(module.p * STEPS) == STEPS:
        return None

    def forward(module: nn.Dropout, x: Tensor) -> Tensor:
        if module.training and module.p > 0 and x.device.type == "cpu":
            return dropout(x, module.p)
        return nn.Dropout.forward(module, x)

    return forward


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """torch's attention, or plain products where those are faster: a short sequence on a CPU, in training, in bf16 or with dropout."""
    short = max(q.shape[2], k.shape[2]) <= SHORT and q.device.type == "cpu" and torch.is_grad_enabled() and (mask is None or mask.shape[1] == 1)
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if not short or special or (q.dtype == torch.float32 and not dropout):
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, is_causal, **kwargs)  # type: ignore[return-value]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and q.shape[2] > 1:
        mask = _causal(q.shape[2], k.shape[2], q.dtype)
    elif mask is not None and mask.dtype == torch.bool:
        mask = _added(mask, q.dtype)
    y = attention(q, k, v, mask, q.shape[-1] ** -0.5 if scaling is None else scaling, dropout)
    return y.transpose(1, 2), None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to the scores, from one that is True where attention is allowed."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@lru_cache(maxsize=4)
def _causal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The same in every layer of a step."""
    return _added(torch.ones(rows, columns, dtype=torch.bool).tril(), dtype)


def _loss(model: PreTrainedModel) -> Callable[..., Any] | None:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None or model.base_model is model or "forward" in model.__dict__:
        return None
    plain = type(model).forward
    if not {"labels", "kwargs"} <= inspect.signature(plain).parameters.keys():
        return None

    @wraps(plain)  # the signature is asked for, by the Trainer and by graft.data.batching.packs
    def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        head, given = model.get_output_embeddings(), {name for name, value in kwargs.items() if value is not None}
        adapted = SLOT in head._modules or head.weight.requires_grad
        more = model.config.output_hidden_states or model.config.output_attentions
        if args or "labels" not in given or not model.training or not given <= LOSS_INPUTS or adapted or more:
            return plain(model, *args, **kwargs)
        labels, count = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        return CausalLMOutputWithPast(loss=causal_loss(model.base_model(**kwargs).last_hidden_state, head.weight, labels, count))

    return forward


def causal_loss(hidden: Tensor, weight: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of each next token, from ``hidden [rows, positions, d]`` and the head's ``weight [vocabulary, d]``.

    Only positions that are followed by a label are multiplied with the head. Divided by ``count``; by their number where it is None.
    """
    following = labels[:, 1:]
    wanted = following != IGNORED
    total = linear_cross_entropy(hidden[:, :-1][wanted], weight, following[wanted])
    return total / (wanted.sum() if count is None else count)


# ---- the whole model --------------------------------------------------------------------------------------------------------


class _Probe:
    """A small padded batch, and what a model answers to it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        table = model.get_input_embeddings().weight
        ids = torch.randint(len(table), (2, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        self.batch = {"input_ids": ids.to(table.device), "attention_mask": mask.to(table.device)}
        self.labels = torch.where(mask == 1, ids, IGNORED).to(table.device)
        self.labels[0, :3] = IGNORED

    def answer(self) -> Tensor:
        """The first output (logits), in eval mode, with gradients enabled so that every part takes the way it takes in training."""
        output: Tensor = self._run(self.model, **self.batch)[0]
        return output.detach()

    def agrees(self, before: Tensor, after: Tensor) -> bool:
        if before.shape[:2] == self.batch["input_ids"].shape:
            real = self.batch["attention_mask"].bool()
            before, after = before[real], after[real]
        return bool((after - before).abs().max() <= torch.finfo(before.dtype).eps ** 0.5 * before.abs().max())

    def same_loss(self) -> bool:
        """Whether the fused loss is the model's own, as a mean and divided by a given number, at logits as large as caps act on."""
        head = self.model.get_output_embeddings()
        hidden = self._run(self.model.base_model, **self.batch).last_hidden_state.detach()
        gain = LOUD / (hidden @ head.weight.T).abs().max()
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gain,))
        try:
            for count in (None, torch.tensor(7, device=self.labels.device)):
                extra = {} if count is None else {"num_items_in_batch": count}
                wanted = self._run(self.model, **self.batch, labels=self.labels, **extra).loss
                found = causal_loss(hidden * gain, head.weight, self.labels, count)
                if wanted is None or not torch.isclose(found.float(), wanted.float(), rtol=torch.finfo(head.weight.dtype).eps ** 0.5):
                    return False
        finally:
            hook.remove()
        return True

    def _run(self, module: nn.Module, **inputs: Any) -> Any:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)  # as after attach(): a norm that is trained would run as it did
        try:
            with evaluating(self.model):
                return module(**inputs)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
