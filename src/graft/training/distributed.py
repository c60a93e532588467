"""More than one process: each holds the whole adapter and takes its share of every batch.

An adapter is small, so it is replicated and only the frozen base may be split (:func:`shard`, FSDP2). What a callback, an
allocation or a save sees is then always an ordinary whole tensor, and methods need to know nothing of processes. Gradients are
averaged over the processes once an update, before clipping.

There is no DistributedDataParallel around the model: its reducer is built once, from the parameters that ask for a gradient at
that moment, and would miss those that a method unfreezes later (LISA). :func:`average_gradients` looks at every update anew.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler

from graft.core.adapter import Adapter, registry_of
from graft.core.errors import GraftError, ToldElsewhere
from graft.core.hashing import content_hash, fingerprint
from graft.core.storage import check_whole
from graft.core.target import SLOT, all_targets
from graft.data.encoding import IGNORED

_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # world sizes, as MPI launchers give them


def start() -> bool:
    """Joins the processes that torchrun, ``accelerate launch`` or MPI started; returns whether the launcher asks for FSDP2.

    Talks over nccl on CUDA and gloo on the CPU. Raises :class:`GraftError` for a launch that Graft has no answer to.
    """
    try:
        asks_to_shard = _asks_to_shard(os.environ)
    except GraftError as error:  # all processes see the same, and cannot talk yet
        raise (ToldElsewhere if int(os.environ.get("RANK", 0)) else GraftError)(str(error)) from None
    if asks_to_shard:
        del os.environ["ACCELERATE_USE_FSDP"]  # shard() does it; accelerate must not do it again
    if "LOCAL_RANK" in os.environ or any(int(os.environ.get(name, 1)) > 1 for name in _MPI):
        from accelerate import PartialState

        try:
            state = PartialState(cpu=on_cpu(), backend="gloo" if on_cpu() else None)
        except ValueError as error:
            raise GraftError(f"the processes cannot find each other ({str(error).rstrip('.')}); start them with torchrun.") from None
        joined = state.num_processes
    else:
        joined = 1
    if joined != world_size():
        raise GraftError(f"a process group of {world_size()} was made by hand; start the processes with torchrun, which tells each of them its rank.")
    return asks_to_shard


def _asks_to_shard(environment: Mapping[str, str]) -> bool:
    """Whether ``accelerate launch`` asks for FSDP2. Raises :class:`GraftError` for what it asks beyond data parallelism and FSDP2."""

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1", "yes")

    for name, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context or sequence parallelism"),
    ):
        if on(name):
            raise GraftError(f"the launcher asks for {what} ({name}), which Graft does not have; launch without it, or with --shard (FSDP2).")
    if on("ACCELERATE_USE_CPU") and "MASTER_ADDR" in environment and "LOCAL_RANK" not in environment and not any(map(environment.get, _MPI)):
        raise GraftError("accelerate launch --cpu starts one process only, whatever --num_processes says; use torchrun, or --multi_gpu for --cpu.")
    if not on("ACCELERATE_USE_FSDP"):
        return False
    if environment.get("FSDP_VERSION", "1") != "2":
        raise GraftError(f"the launcher asks for FSDP version {environment.get('FSDP_VERSION', '1')}, but Graft shards with 2; add --fsdp_version 2.")
    for name, what in (("FSDP_OFFLOAD_PARAMS", "offloading"), ("FSDP_ACTIVATION_CHECKPOINTING", "activation checkpointing")):
        if on(name):
            raise GraftError(f"the launcher asks for FSDP with {what} ({name}), which Graft does not have; launch without it.")
    return True


def stop() -> None:
    """Leaves the other processes, at the end of the program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_cpu() -> bool:
    """Whether training runs on the CPU."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def rank() -> int:
    """The number of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """What each process gave, in the order of their ranks; small Python objects only."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """What fails on one process fails on all, so that none waits for one that has gone; they meet at the end.

    The first process that failed raises its own error and speaks for the others, which raise :class:`ToldElsewhere`. Nothing
    inside may wait for another process.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    reports = gather(None if mine is None else str(mine) if isinstance(mine, GraftError) else f"{type(mine).__name__}: {mine}")
    speaker, report = next(((process, said) for process, said in enumerate(reports) if said is not None), (rank(), None))
    if speaker != rank():
        raise ToldElsewhere(report) from mine
    if mine is not None:
        raise mine


# ---- gradients and data ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of ``parameters`` over all processes: one all-reduce for each dtype and device.

    Call it once an update, before clipping. A parameter that got a gradient on some processes counts as zero on the others; one
    that got none anywhere keeps none, so that the optimizer goes on leaving it alone.
    """
    if world_size() == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for (dtype, device), group in groups.items():
        present = [parameter.grad is not None for parameter in group]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), torch.tensor(present, dtype=dtype, device=device)])
        dist.all_reduce(flat)
        flat /= world_size()
        *averages, shares = flat.split([*(parameter.numel() for parameter in group), len(group)])
        if not all(present):
            present = (shares > 0).tolist()
        for parameter, average, somewhere in zip(group, averages, present, strict=True):
            parameter.grad = average.view_as(parameter) if somewhere else None


class Shares(BatchSampler):
    """This process's share of every batch that one process alone would see: consecutive rows, as evenly as can be.

    The last batch of an epoch may be too small for all of them; then a share is empty.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int):
        super().__init__(sampler, batch_size * world_size(), drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in super().__iter__():
            share = math.ceil(len(rows) / world_size())
            yield rows[rank() * share : (rank() + 1) * share]


def loader(dataset: Any, sampler: Sampler[int], batch_size: int, collate: Callable[[Sequence[Any]], dict[str, Tensor]], pin: bool) -> DataLoader[Any]:
    """Batches of this process's rows, ``batch_size`` or fewer. For an empty share comes a row without labels, which adds nothing to the loss."""
    from accelerate.data_loader import prepare_data_loader

    def filled(rows: Sequence[Any]) -> dict[str, Tensor]:
        if rows:
            return collate(rows)
        batch = collate([dataset[0]])
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    batches: DataLoader[Any] = DataLoader(dataset, batch_sampler=Shares(sampler, batch_size), collate_fn=filled, pin_memory=pin)
    return prepare_data_loader(batches, num_processes=1, process_index=0)  # shared out already; this passes the epoch on to the sampler


# ---- the adapter and its base ----------------------------------------------------------------------------------------------


def check_shardable(adapter: Adapter) -> None:
    """Raises :class:`GraftError` where there is one process, or the method trains the base's own storage."""
    if world_size() == 1:
        raise GraftError("shard splits the base over processes, but there is one; start several with torchrun --nproc-per-node, or leave it out.")
    if not adapter.recipe.delta.keeps_base:
        raise GraftError("keep_base=False trains the base's own storage, so there is no frozen base to shard; set keep_base=True or leave shard out.")


def shard(model: nn.Module, adapter: Adapter) -> None:
    """Splits the frozen base over the processes (FSDP2), block by block, on the device of each; the adapter stays whole.

    Call it after :func:`graft.attach`; a forward pass of the model brings each block together for as long as it runs. Raises what
    :func:`check_shardable` raises.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check_shardable(adapter)
    adapter.fingerprint = adapter.fingerprint or fingerprint(model, adapter.modules_to_save)
    registry = registry_of(model)
    assert registry is not None
    wanted_gradients = [requires_grad for _, requires_grad in registry.frozen]
    registry.frozen = []  # or it would keep the whole weights alive
    device = "cpu" if on_cpu() else "cuda"
    left_whole = {p for name, p in model.named_parameters() if f".{SLOT}." in f".{name}" or p.ndim == 0}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (world_size(),)),
        "ignored_params": left_whole,
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
    }
    for block in _blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **{**options, "reshard_after_forward": None})
    model.to(device)  # what stays whole
    base = [p for name, p in model.named_parameters() if f".{SLOT}." not in f".{name}"]
    registry.frozen = list(zip(base, wanted_gradients, strict=True))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in the model's order: a target's path up to its first number."""
    paths = dict.fromkeys(re.findall(r"^(?:.*?\.)?\d+(?=\.|$)", target.name)[0] for target in all_targets(model) if target.depth is not None)
    blocks = (model.get_submodule(path) for path in paths)
    return [block for block in blocks if not isinstance(block, (nn.ModuleList, nn.ModuleDict))]  # these two have no forward


@torch.no_grad()
def synchronise(adapter: Adapter) -> None:
    """Gives every process the adapter of the first: the same start, random bases and masks.

    Raises :class:`GraftError`, on all of them, where they have built different adapters or loaded different base weights.
    """
    if world_size() == 1:
        return
    adapter.fingerprint = adapter.fingerprint or fingerprint(adapter.model, adapter.modules_to_save)
    tensors = _tensors(adapter)
    facts = {"base": adapter.fingerprint, "step": adapter.step} | {name: f"{list(value.shape)} {value.dtype}" for name, value in tensors.items()}
    _refuse_difference(facts, "start all processes with the same version, settings and model files, and with a folder that all can read")
    for value in tensors.values():
        whole = value.contiguous()
        dist.broadcast(whole, src=0)
        value.copy_(whole)


def check_equal(adapter: Adapter) -> None:
    """Raises :class:`GraftError`, on all processes, unless all of them hold the same whole adapter, to the bit, and its callbacks the same state."""
    if world_size() == 1:
        return
    with together():
        check_whole(adapter)
    state = {**adapter.state_dict(), **_tensors(adapter)}
    hashes = {name: content_hash({"": value}) if isinstance(value, Tensor) else value for name, value in state.items()}
    _refuse_difference(hashes, "nothing was saved; a method must draw and decide from the seed, the step and averaged gradients alone")


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Every parameter and buffer of the adapter, also what files leave out (bases that a seed draws again)."""
    owners: dict[str, nn.Module] = {**adapter.deltas, **({"shared": adapter.shared} if adapter.shared is not None else {})}
    tensors = {f"{owner}.{name}": value.data for owner, module in owners.items() for name, value in module.named_parameters()}
    return tensors | {f"{owner}.{name}": value for owner, module in owners.items() for name, value in module.named_buffers()}


def _refuse_difference(facts: Mapping[str, Any], remedy: str) -> None:
    first, *others = gather(facts)
    for process, other in enumerate(others, start=1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                kind = ToldElsewhere if rank() else GraftError
                raise kind(f"process {process} differs from process 0 in {name} of the adapter; {remedy}.")
