"""Methods that freeze or unfreeze parameters during training, and wrappers that must know them all beforehand."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from graft.core.errors import GraftError


def refuse_distributed_wrapper(what: str) -> None:
    """Raises :class:`GraftError` in a forward pass inside of DistributedDataParallel: its reducer was built from the parameters that trained at that
    moment; of others each process would apply its own gradients, and for those that no longer train it would wait. ``what`` begins the message."""
    if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise GraftError(
            f"{what} that DistributedDataParallel does not know; use `graft fit`, or in your own loop "
            "graft.training.distributed.average_gradients(adapter.parameters()) in place of the wrapper."
        )
