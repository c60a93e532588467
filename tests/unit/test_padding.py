"""The arithmetic of benchmarks/padding.py, on numbers worked out by hand."""

from __future__ import annotations

import padding
from graft.data.batching import packing_collator
from graft.data.encoding import collator

EXAMPLES = [{"input_ids": [5] * length, "labels": [5] * length} for length in (8, 2, 5, 3, 4)]


def test_batches_are_consecutive_rows() -> None:
    assert padding.batches([3, 1, 4, 0, 2], 2) == [[3, 1], [4, 0], [2]]


def test_share_of_padding_and_rows_of_a_batch() -> None:
    batched = [[0, 1, 2, 3], [4]]  # 18 tokens in four rows of 8, and 4 in one of 4; packed: 8, 5 + 3 and 2 in three rows of 8
    assert padding.share(EXAMPLES, batched, collator(0)) == (1 - 22 / 36, 2.5)
    assert padding.share(EXAMPLES, batched, packing_collator(0)) == (1 - 22 / 28, 2.0)


def test_examples_of_a_classifier_are_not_packed() -> None:
    packed = padding.measure(padding.CASES["text"], EXAMPLES, 2, 1)
    assert packed.keys() == {"random", "update", "bucketed"}
    assert all(found.keys() == {"padded", "packed", "rows"} for found in packed.values())
    examples = [{**example, "labels": 1} for example in EXAMPLES]
    assert all(found.keys() == {"padded"} for found in padding.measure(padding.CASES["labels"], examples, 2, 1).values())
