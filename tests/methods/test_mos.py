"""What only MoS promises: factors put together from pools, some of whose rows are private."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graft
from graft.methods.deltas.mos import MoSDelta
from tests.methods.small import Net


def net(count: int = 3, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(*(nn.Linear(8, 8) for _ in range(count))).eval()


def attached(model: nn.Module, **options: object) -> tuple[graft.Adapter, list[MoSDelta]]:
    adapter = graft.attach(model, "mos", **{"rank": 2, "expand": 2, "private": 1, "shards": 2, **options})
    return adapter, list(adapter.deltas.values())


def randomised(adapter: graft.Adapter) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for p in adapter.shared.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return {name[0]: p for name, p in adapter.shared.named_parameters()}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_put_together_shard_by_shard(shards: int) -> None:
    model = net().double()
    adapter, deltas = attached(model, shards=shards, alpha=2.0)
    pools = randomised(adapter)
    for delta in deltas:
        assert delta.layout["rank"] == 4
        rows = [torch.cat([pools["A"][delta.index_A[j * shards + i]] for i in range(shards)]) for j in range(4)]
        columns = [torch.cat([pools["B"][delta.index_B[j * shards + i]] for i in range(shards)]) for j in range(4)]
        wanted = 0.5 * sum(torch.outer(column, row) for column, row in zip(columns, rows, strict=True))
        torch.testing.assert_close(delta.weight()[0] - delta.target.weight(), wanted)


def test_private_rows_belong_to_one_target_and_public_ones_to_whoever_drew_them() -> None:
    model = net()
    adapter, deltas = attached(model)
    pool = randomised(adapter)["A"]
    public = len(pool) - 3 * 2
    for number, delta in enumerate(deltas):
        index = delta.index_A.tolist()
        assert len(index) == len(set(index)) == 8
        assert index[-2:] == [public + 2 * number, public + 2 * number + 1]
        assert max(index[:-2]) < public
        pool.grad = None
        model[number](torch.randn(5, 8)).square().sum().backward()
        assert sorted(index) == torch.nonzero(pool.grad.abs().sum(1)).flatten().tolist()
        assert index != delta.index_B.tolist()


def test_with_private_rows_only_it_is_lora() -> None:
    model, twin = net(), net()
    adapter, deltas = attached(model, expand=1, private=2, shards=1)
    reference = graft.attach(twin, "lora", rank=2)
    with torch.no_grad():
        for delta, lora in zip(deltas, reference.deltas.values(), strict=True):
            lora.A.copy_(adapter.shared.get("A", delta.target)[delta.index_A])
    for own, maps in ((adapter, model), (reference, twin)):
        optimizer = own.bind(torch.optim.SGD(own.parameters(), lr=0.05), 4)
        for step in range(4):
            optimizer.zero_grad()
            maps(torch.randn(5, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
    for delta, lora in zip(deltas, reference.deltas.values(), strict=True):
        torch.testing.assert_close(delta.weight()[0], lora.weight()[0])


def test_the_size_is_that_of_a_lora_of_the_equivalent_rank() -> None:
    sizes = {attached(net(), expand=x, shards=s, private=p)[0].parameter_count for x in (1, 2, 3) for s in (1, 4) for p in (0, 1)}
    assert sizes == {3 * 2 * 16}


def test_the_rank_stops_where_public_rows_end() -> None:
    assert [delta.layout["rank"] for delta in attached(net(2), expand=8)[1]] == [1 + 1 * 2] * 2


def test_more_private_ranks_than_there_are() -> None:
    with pytest.raises(graft.GraftError, match="private is 3, but there are 2 ranks"):
        attached(net(), private=3)
