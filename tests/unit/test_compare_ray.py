"""A comparison on a local Ray cluster of two nodes, one of them killed in the middle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra graft[ray] is not installed")

SCRIPT = """
import json, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster
from graft.compare.comparison import compare, prepare_comparison
from graft.compare.config import CompareConfig
from graft.compare.ray_workers import RayWorkers

values, kill = json.loads(sys.argv[1]), sys.argv[2] == "kill"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000})
second = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
killed = False

def watch(statuses):
    global killed
    going = [status for status in statuses if status.state == "running" and status.step > status.steps / 2]
    if kill and not killed and len(going) >= 2:
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        killed = True

workers = RayWorkers(cluster.address)
assert workers.slots == 2, workers.slots
records = compare(prepare_comparison(CompareConfig.make(values)), workers, watch)
assert killed == kill
print(json.dumps([[r["contender"], r["lr"], r["seed"], r["state"], r["error"], r["predictions_hash"], r["loss"]] for r in records]))
"""


def run(values: str, kill: bool) -> str:
    done = subprocess.run([sys.executable, "-c", SCRIPT, values, "kill" if kill else "-"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.real
def test_a_node_that_dies_loses_nothing(tmp_path: Path) -> None:
    import json

    from tests import folders

    model = folders.causal(tmp_path / "model")
    (tmp_path / "data").mkdir()
    folders.answers(tmp_path / "data" / "train.jsonl", 40)
    folders.answers(tmp_path / "data" / "test.jsonl", 12, seed=3)
    values = {"data": str(tmp_path / "data"), "model": str(model), "methods": ["dora"], "steps": 400, "batch_size": 4, "max_length": 40,
              "lrs": [1e-3, 1e-2], "refine": False, "seeds": 1, "validation_rows": 8}  # fmt: skip
    whole = run(json.dumps({**values, "output": str(tmp_path / "whole")}), kill=False)
    broken = run(json.dumps({**values, "output": str(tmp_path / "broken")}), kill=True)
    assert json.loads(broken) == json.loads(whole)
    assert all(state == "finished" for _, _, _, state, *_ in json.loads(whole))
