"""Batches with less padding: several examples in one row, and an order of the rows in which those of a batch are about as long."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from graft.core.calibration import evaluating
from graft.core.errors import GraftError
from graft.data.encoding import IGNORED, collator

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packing_collator(pad_token_id: int) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
    """Lays the examples of a batch into as few rows as first-fit decreasing finds, none longer than the longest example.

    Returns ``input_ids``, ``labels`` and ``position_ids``, each ``[rows, longest]``, and ``use_cache=False``. In a model that passes
    :func:`packs`, the token losses are those of the padded batch. Raises :class:`GraftError` for labels that are one number an example.

    Transformers tells the examples of a row apart by positions that do not go up by one, and only without an attention mask and
    without a cache (``masking_utils.find_packed_sequence_indices``).
    """

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not isinstance(examples[0]["labels"], list):
            raise GraftError("examples with one label each (classification) cannot share a row; use graft.data.encoding.collator.")
        room = max(len(example["input_ids"]) for example in examples)
        rows = [[examples[i] for i in row] for row in first_fit([len(example["input_ids"]) for example in examples], room)]

        def filled(values: Callable[[dict[str, Any]], Sequence[int]], filler: int) -> Tensor:
            lines = [list(chain.from_iterable(map(values, row))) for row in rows]
            return torch.tensor([line + [filler] * (room - len(line)) for line in lines])

        return {
            "input_ids": filled(lambda example: example["input_ids"], pad_token_id),
            # In the shifted loss the last token of one example would be asked for the first token of the next.
            "labels": filled(lambda example: [IGNORED, *example["labels"][1:]], IGNORED),
            # A padding token is an example of its own: it sees itself and nothing else, so that no row of the attention mask is empty.
            "position_ids": filled(lambda example: range(len(example["input_ids"])), 0),
            "use_cache": False,
        }

    return collate


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``room``: the longest first, each into the first bin that has room for it.

    At most 11/9 of the fewest possible bins and 6/9 of a bin more (Dosa 2007).
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((i for i, space in enumerate(left) if space >= lengths[index]), len(bins))
        if at == len(bins):
            bins.append([])
            left.append(room)
        bins[at].append(index)
        left[at] -= lengths[index]
    return bins


def real_tokens(batch: dict[str, Any]) -> Tensor:
    """Which tokens of a padded or packed batch are not padding, as a mask ``[rows, longest]``.

    An example of one token, which has no loss, looks like padding in a packed batch and counts as such.
    """
    if "attention_mask" in batch:
        mask: Tensor = batch["attention_mask"].bool()
        return mask
    positions: Tensor = batch["position_ids"]
    return (positions > 0) | (nn.functional.pad(positions, (0, 1))[:, 1:] == 1)


def packs(model: PreTrainedModel) -> bool:
    """Whether the model gives packed examples the logits that it gives them in rows of their own: tried out on four short ones.

    False for states that run through a row (Mamba), positions that cannot be told (BLOOM), attention that looks both ways, heads with
    one output a row, and flash attention, for which transformers finds boundaries by positions in batches of a single row only.
    """
    if not {"position_ids", "use_cache"} <= set(inspect.signature(model.forward).parameters):
        return False
    embedding = model.get_input_embeddings().weight
    ids = torch.randint(len(embedding), (19,), generator=torch.Generator().manual_seed(0)).tolist()
    # Packed into 8, 5 + 2 and 4: alone, with a neighbour and padding, with padding. In this order both batches have their tokens in the same order.
    examples = [{"input_ids": piece, "labels": piece} for piece in (ids[:8], ids[8:13], ids[13:15], ids[15:])]
    found = []
    with evaluating(model), torch.no_grad():
        for batch in (collator(0)(examples), packing_collator(0)(examples)):
            inputs = {name: value.to(embedding.device) for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
            logits = model(**inputs, use_cache=False).logits
            if logits.shape[:2] != batch["input_ids"].shape:
                return False
            found.append(logits[real_tokens(batch).to(logits.device)])
    apart, packed = found
    tolerance = torch.finfo(apart.dtype).eps ** 0.5 * apart.abs().max()  # far above rounding, far below what a neighbour changes
    return bool((apart - packed).abs().max() <= tolerance)


class DataOrder(Sampler[int]):
    """A permutation of the rows for each epoch, a function of seed and epoch alone, so that a resumed run sees the same rows."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.permutation(self._generator()))

    def permutation(self, generator: torch.Generator) -> list[int]:
        """The rows of the epoch; what else the epoch draws comes from ``generator`` after it."""
        rows: list[int] = torch.randperm(self.count, generator=generator).tolist()
        return rows

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)


class BucketedOrder(DataOrder):
    """:class:`DataOrder` in which the rows of a batch are about as long.

    Random order, cut into pools of ``pool`` batches; the rows of a pool are sorted by length, and its batches come in random order. A pool is
    thus a random draw and a batch is not: where the loss is a mean over the tokens of an update, those of short rows weigh more than in random
    order. With ``pool`` = batches of an update, every update has the rows it has in random order, and only the split among its batches differs.
    ``pool=None`` is what transformers takes: 50, or fewer so that there are four pools and the batches change from epoch to epoch.

    Not ``transformers.LengthGroupedSampler``: its batches come sorted within a pool, so that lengths rise and fall over training.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int | None = None):
        super().__init__(len(lengths), seed)
        self.lengths, self.batch_size = lengths, batch_size
        self.pool = pool or max(1, min(50, len(lengths) // (4 * batch_size)))

    def __iter__(self) -> Iterator[int]:
        generator = self._generator()
        order = self.permutation(generator)
        for start in range(0, len(order), self.pool * self.batch_size):
            rows = sorted(order[start : start + self.pool * self.batch_size], key=lambda row: -self.lengths[row])
            batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            whole = len(rows) // self.batch_size  # the last batch of an epoch may be short and has to stay the last
            for index in [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(batches))]:
                yield from batches[index]
