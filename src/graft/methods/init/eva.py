"""EVA: starts A at the leading directions of each target's inputs, and gives ranks to the targets that explain most variance.

    X [tokens, in] the inputs of a target;  principal directions V [k, in], k = round(rho r), explained-variance ratios e [k]
    ranks: the r * targets largest ratios over the whole model, r_m of them at target m (0: the target is left as it is)
    A = V[:r_m],  B = 0;  the scale stays alpha / r at every rank

Paischer et al., arXiv 2410.07170. Directions are mean-centred (PCA), as in the code; the text speaks of an SVD of the activations.
Targets with the same input are analysed once. All given batches are used, where the code stops early once directions settle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Init
from graft.core.errors import GraftError
from graft.core.target import Target
from graft.methods.families.factored import low_rank_deltas
from graft.numerics.pca import IncrementalPCA

if TYPE_CHECKING:
    from graft.core.adapter import Adapter
    from graft.core.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class EVA(Init):
    """Hyper-parameters of EVA."""

    rho: float = option(2.0, "a target gets at most rho times the rank; 1 keeps all ranks equal", paper="1..2", low=1)
    whiten: bool = option(False, "divide each direction by the root of its singular value")

    def prepare(self, adapter: Adapter, calibration: Calibration | None) -> None:
        deltas = low_rank_deltas(adapter, "EVA")
        if calibration is None:
            raise GraftError("EVA looks at activations; pass calibration=a few batches.")
        targets = [delta.target for delta in deltas.values()]
        wanted = {name: min(round(self.rho * delta.rank), *delta.target.shape) for name, delta in deltas.items()}
        groups = calibration.groups(targets)
        reached = {target.name for group in groups for target in group}
        missed = [target.name for target in targets if target.name not in reached]
        if missed:
            raise GraftError(f"the first calibration batch does not reach {missed[0]} ({len(missed)} targets in all); narrow the targets.")
        analysed = {group[0].name: IncrementalPCA(max(wanted[t.name] for t in group)) for group in groups}

        def consume(target: Target, rows: Tensor) -> None:
            analysed[target.name].update(rows)

        calibration.inputs([group[0] for group in groups], consume)
        for pca in analysed.values():
            pca.finish()
        found = {target.name: analysed[group[0].name] for group in groups for target in group}
        ranks = self.ranks({name: found[name].ratio[: wanted[name]] for name in deltas}, sum(d.rank for d in deltas.values()))
        if not any(ranks.values()):
            raise GraftError("the inputs of all targets are constant over the calibration batches, so EVA finds no direction; give others.")
        for name, delta in deltas.items():
            if not ranks[name]:
                adapter.drop_target(name)
                continue
            pca = found[name]
            assert pca.components is not None
            directions = pca.components[: ranks[name]]
            if self.whiten:
                directions = directions / pca.singular_values[: ranks[name], None].sqrt()
            delta.set_start(A=directions, B=torch.zeros(delta.target.shape[0], ranks[name]))

    @staticmethod
    def ranks(ratios: dict[str, Tensor], budget: int) -> dict[str, int]:
        """How many of the ``budget`` largest ratios lie at each target; equal ratios go to the earlier target; zeros get none."""
        owners = torch.cat([torch.full((len(r),), i) for i, r in enumerate(ratios.values())])
        values = torch.cat([r.double().cpu() for r in ratios.values()])
        best = values.argsort(descending=True, stable=True)[:budget]
        best = best[values[best] > 0]
        return dict(zip(ratios, torch.bincount(owners[best], minlength=len(ratios)).tolist(), strict=True))


catalogue.register(
    Method("eva", "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", "arXiv 2410.07170", "init",
           "A from the inputs' principal directions, ranks moved to where they explain most", catalogue["lora"].delta, init=EVA,
           random=False, needs="calibration")
)  # fmt: skip
