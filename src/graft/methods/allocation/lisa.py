"""LISA: trains the embedding and the head always, and a few whole blocks at a time, drawn anew every K updates.

    at update t with t mod K = 0: freeze all blocks, draw gamma of the L blocks without replacement, train those
    between draws: plain AdamW on {embedding, head, final norm} and the drawn blocks

Pan et al., arXiv 2403.17919. The paper's memory figures need the optimizer state of frozen blocks dropped, which the public code
does not do; ``keep_state`` says which. Draws are a function of the seed and the number of the draw alone, equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from graft.core import optimizer_state
from graft.core.callback import Callback, State
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, Part
from graft.core.errors import GraftError
from graft.methods.families.wrapped import refuse_distributed_wrapper


@dataclass(frozen=True, kw_only=True)
class LISA(Part):
    """Hyper-parameters of LISA."""

    active_blocks: int = option(2, "blocks gamma that train at a time", paper="2..4", low=0)
    interval: int = option(20, "updates K between two draws", unit="updates", paper="3..50", low=1)
    keep_state: Literal["drop", "keep"] = option("drop", "the optimizer state of blocks that are frozen again")

    def callbacks(self) -> list[Callback]:
        return [BlockSampler(self)]


class BlockSampler(Callback):
    """Switches blocks on and off."""

    def __init__(self, config: LISA):
        self.config = config

    def on_start(self) -> None:
        if self.config.active_blocks > len(self.blocks()):
            raise GraftError(f"LISA.active_blocks is {self.config.active_blocks}, but the targets lie in {len(self.blocks())} blocks.")
        self._draw(self.adapter.step // self.config.interval)

    def blocks(self) -> dict[int, list[Delta]]:
        """The deltas of each block, by depth."""
        blocks: dict[int, list[Delta]] = {}
        for delta in self.adapter.deltas.values():
            if delta.target.depth is not None:
                blocks.setdefault(delta.target.depth, []).append(delta)
        return blocks

    def drawn(self, draw: int) -> list[int]:
        """The depths that train after draw number ``draw``."""
        depths = sorted(self.blocks())
        generator = torch.Generator().manual_seed(self.adapter.seed + 1_000_003 * draw)
        return sorted(depths[i] for i in torch.randperm(len(depths), generator=generator)[: self.config.active_blocks].tolist())

    def before_forward(self) -> None:
        refuse_distributed_wrapper("LISA unfreezes blocks")

    def after_update(self, step: int) -> None:
        if (step + 1) % self.config.interval == 0:
            self._draw((step + 1) // self.config.interval)

    def _draw(self, draw: int) -> None:
        chosen = set(self.drawn(draw))
        for depth, deltas in self.blocks().items():
            for parameter in (p for delta in deltas for p in delta.parameters()):
                parameter.requires_grad_(depth in chosen)
                if depth not in chosen:
                    parameter.grad = None  # else AdamW would go on applying the last gradient
                    if self.config.keep_state == "drop":
                        optimizer_state.drop(self.optimizer, parameter)

    def state_dict(self) -> State:
        return {"draw": self.adapter.step // self.config.interval}

    def load_state_dict(self, state: State) -> None:
        draw = state["draw"]
        assert isinstance(draw, int)
        self._draw(draw)


catalogue.register(
    Method("lisa", "LISA: Layerwise Importance Sampling for Memory-Efficient LLM Fine-Tuning", "arXiv 2403.17919", "allocation",
           "a few whole blocks at a time", catalogue["full"].delta, allocation=LISA, targets="all")
)  # fmt: skip
