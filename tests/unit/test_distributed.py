"""Two processes against one: the same losses and weights, whole and equal adapters, and errors that leave nobody waiting."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graft
from graft import GraftError
from graft.core.errors import ToldElsewhere
from graft.core.hashing import content_hash
from graft.core.storage import check_whole
from graft.training import distributed
from graft.training import fit as fitting
from graft.training.config import FitConfig
from graft.training.fit import fit
from tests import folders, tiny
from tests.processes import Launch

STEPS = 12
# adalora cuts at updates 4, 6 and 8, lisa draws at 0, 3, 6 and 9, galore projects anew at 5 and 10
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"settings": {"rank": 3}},
    "adalora": {"settings": {"rank": 2, "initial_rank": 4, "interval": 2, "warmup": 0.2, "final": 0.3}},
    "randlora": {"settings": {"rank": 4, "save_bases": False}},
    "lisa": {"settings": {"active_blocks": 1, "interval": 3}, "seed": 5},  # block 1, 0, 1, 0
    "galore": {"settings": {"rank": 4, "update_interval": 5}},
    "classifier": {"method": "lora", "settings": {"rank": 3}},  # a new head, and a loss over rows instead of tokens
}
KINDS = ("replicated", "sharded")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows. 21 rows in batches of 4: the last of an epoch is one row, which leaves one of two processes with none."""
    folder = tmp_path_factory.mktemp("data")
    folders.causal(folder / "causal")
    settings = folders.encoder(folder / "encoder") / "config.json"
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # its masks fall on other rows
    settings.write_text(json.dumps(json.loads(settings.read_text()) | without_dropout))
    folders.labels(folder / "labels.jsonl", 21)
    rows = [json.loads(line) for line in folders.answers(folder / "plain.jsonl", 21).read_text().splitlines()]
    for index, row in enumerate(rows):  # answers of one to five tokens
        row["answer"] = " ".join([row["answer"]] * (1 + index % 5))
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _config(data: Path, output: Path, name: str, /, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"data": str(data / "answers.jsonl"), "model": str(data / "causal"), "output": str(output), "method": name}
    if name == "classifier":
        values |= {"data": str(data / "labels.jsonl"), "model": str(data / "encoder")}
    values |= {"steps": STEPS, "max_length": 32, "lr": 5e-3, "accumulation": 2, "batch_size": 2, "checkpoint_every": 5}
    return values | METHODS[name] | changes


# ---- what runs in the processes --------------------------------------------------------------------------------------------


def _fits(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs the configs one after the other; what this process held at the end of each, looked at before anything compares processes."""
    found: list[dict[str, Any]] = []
    compare = distributed.check_equal

    def look(adapter: graft.Adapter) -> None:
        state = {**adapter.state_dict(), **distributed._tensors(adapter)}
        base = next(p for name, p in adapter.model.named_parameters() if name.endswith(("0.mlp.down_proj.weight", "0.output.dense.weight")))
        sharded = hasattr(base, "to_local")
        latest.update(
            tensors={name: content_hash({name: value}) for name, value in state.items() if isinstance(value, Tensor)},
            trains=[p.requires_grad for p in adapter.parameters()],
            base=(base.shape, base.to_local().shape if sharded else base.shape),
        )
        if sharded and adapter.step == STEPS:
            latest["outputs"] = _outputs(adapter.model)
        compare(adapter)

    distributed.check_equal = look
    for config in configs:
        latest: dict[str, Any] = {}
        fit(FitConfig.make(config))
        found.append(latest)
    return found


def _outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 17).reshape(2, 6)).logits.clone()


# ---- losses and weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Every method as one process, as two, and as two with the base sharded: where the runs lie, and what both processes held."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {f"{kind}-{name}": _config(data, folder / f"{kind}-{name}", name, shard=kind == "sharded") for name in METHODS for kind in KINDS}
    launch = Launch(_fits, list(configs.values()))
    for name in METHODS:
        fit(FitConfig.make(_config(data, folder / f"one-{name}", name, batch_size=4)))
    results = launch.results()
    return folder, {name: [result[index] for result in results] for index, name in enumerate(configs)}


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_with_the_same_global_batch(outputs: Any, name: str, kind: str) -> None:
    folder, _ = outputs
    one, two = _lines(folder / f"one-{name}"), _lines(folder / f"{kind}-{name}")
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "lr"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5), key
    assert one[0]["loss"] != pytest.approx(one[-1]["loss"], rel=1e-3)  # something was learned
    expected, seen = (load_file(folder / f"{run}-{name}" / "adapter_model.safetensors") for run in ("one", kind))
    assert expected.keys() == seen.keys()
    # The first step of a block that LISA draws is lr times the sign of its gradient, and where that is almost zero the sign is noise.
    noise = 0.1 * 5e-3 if name == "lisa" else 1e-6
    for key, value in expected.items():
        torch.testing.assert_close(seen[key], value, rtol=1e-4, atol=noise)
    run = json.loads((folder / f"{kind}-{name}" / "run.json").read_text())
    assert run["processes"] == 2
    assert not (folder / f"{kind}-{name}" / "checkpoints").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_adapters_bases_and_decisions_are_equal_on_both(outputs: Any, name: str, kind: str) -> None:
    first, second = outputs[1][f"{kind}-{name}"]
    assert first["tensors"] == second["tensors"]
    assert first["trains"] == second["trains"]
    if name == "randlora":
        assert any("randlora_B" in key for key in first["tensors"])
    if name == "adalora":
        assert any("callbacks.0.kept" in key for key in first["tensors"])


@pytest.mark.parametrize("name", METHODS)
def test_a_sharded_base_is_in_pieces_and_its_adapter_is_whole(outputs: Any, data: Path, name: str) -> None:
    folder, states = outputs
    for state in states[f"sharded-{name}"]:
        (rows, columns), local = state["base"]
        assert local == (rows // 2, columns)
    fresh, _ = graft.load(data / "causal") if name != "classifier" else graft.load(data / "encoder", task="classification", labels=["bad", "good"])
    adapter = graft.load_adapter(fresh, folder / f"sharded-{name}")  # checks the fingerprint too
    assert adapter.step == STEPS
    torch.testing.assert_close(_outputs(fresh), states[f"sharded-{name}"][0]["outputs"], rtol=1e-4, atol=1e-5)
    written = [json.loads((folder / f"{run}-{name}" / "adapter_config.json").read_text()) for run in ("one", "sharded")]
    for config in written:
        del config["graft"]["content"]
    assert written[0] == written[1]


def test_ranks_were_cut_and_blocks_were_drawn_anew(outputs: Any) -> None:
    """What the comparisons above are worth: the methods did change their minds on the way."""
    folder, states = outputs
    kept = [value != 0 for key, value in load_file(folder / "replicated-adalora" / "adapter_model.safetensors").items() if "lora_E" in key]
    assert sum(int(k.sum()) for k in kept) == 2 * len(kept)  # of 4 each
    assert len({int(k.sum()) for k in kept}) > 1
    adapter = graft.attach(tiny.llama(), "lisa", **METHODS["lisa"]["settings"], seed=METHODS["lisa"]["seed"])
    adapter.optimizer(1e-3, STEPS)
    assert [adapter.callbacks[0].drawn(draw) for draw in range(4)] == [[1], [0], [1], [0]]
    assert not all(states["replicated-lisa"][0]["trains"])


def test_a_classifier_accumulates_as_one_large_batch(data: Path, tmp_path: Path) -> None:
    """In one process too: the models' own loss is a mean of each forward pass, which must not be summed over them."""
    one = fit(FitConfig.make(_config(data, tmp_path / "one", "classifier", batch_size=7, accumulation=1, steps=6)))
    many = fit(FitConfig.make(_config(data, tmp_path / "many", "classifier", batch_size=1, accumulation=7, steps=6)))
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
    norms = [[line["grad_norm"] for line in _lines(tmp_path / name)] for name in ("one", "many")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


# ---- killed and resumed ----------------------------------------------------------------------------------------------------


def _run(config: dict[str, Any], resume: bool = False, dies_after: int | None = None) -> None:
    """A run in which the second process is killed when ``dies_after`` updates are done."""
    step = fitting.GraftTrainer.training_step

    def fall(self: fitting.GraftTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if distributed.rank() == 1 and self.state.global_step == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    fitting.GraftTrainer.training_step = fall  # type: ignore[method-assign]
    fit(FitConfig.make(config), resume=resume)


def _refused(config: dict[str, Any], resume: bool = False) -> tuple[str, str]:
    """The error that a run ends with: its class and its sentence."""
    try:
        fit(FitConfig.make(config), resume=resume)
    except GraftError as error:
        return type(error).__name__, str(error)
    raise AssertionError("the run was not refused")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_killed_and_resumed_are_never_killed(data: Path, tmp_path: Path, kind: str) -> None:
    settings = {"settings": {**METHODS["adalora"]["settings"], "dropout": 0.2}, "checkpoint_every": 4, "shard": kind == "sharded"}
    whole, killed = (_config(data, tmp_path / name, "adalora", **settings) for name in ("whole", "killed"))
    Launch(_run, whole).results()
    launch = Launch(_run, killed, False, 6)
    for process in reversed(launch.processes):
        process.join(120)
        assert not process.is_alive(), "a process waits for one that has gone"
    launch.kill()
    assert len(_lines(tmp_path / "killed")) == 6  # two more than the checkpoint
    with pytest.raises(GraftError, match=r"holds a run of 2 processes, and there are 1 now; resume it with as many"):
        fit(FitConfig.make(killed), resume=True)
    Launch(_run, killed, True).results()
    expected, seen = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    for name, value in expected.items():
        assert torch.equal(value, seen[name]), name
    assert [line["loss"] for line in _lines(tmp_path / "whole")] == [line["loss"] for line in _lines(tmp_path / "killed")]


# ---- errors ----------------------------------------------------------------------------------------------------------------


def _errors(data: Path, folder: Path) -> dict[str, Any]:
    """Everything that must be refused, and by which of two processes; none of it may hang."""
    rank = distributed.rank
    seen: dict[str, Any] = {}
    seen["both"] = _refused(_config(data, folder / "both", "lora", settings={"rank": 17}))
    missing = "nowhere.jsonl" if rank() == 1 else "answers.jsonl"
    seen["second"] = _refused(_config(data, folder / "second", "lora", data=str(data / missing)))
    seen["per_layer"] = _refused(
        _config(data, folder / "per_layer", "galore", accumulation=1, max_grad_norm=0, settings={"rank": 4, "per_layer": True})
    )
    seen["keep_base"] = _refused(_config(data, folder / "keep_base", "lora", method="full", settings={"keep_base": False}, shard=True))
    seen["seeds"] = _refused(_config(data, folder / "seeds", "lora", settings={"rank": 3 + rank()}))

    step = fitting.GraftTrainer.training_step

    def diverge(self: fitting.GraftTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if rank() == 1 and self.state.global_step == 3:
            next(iter(self.adapter.parameters())).data.add_(1e-6)
        return step(self, *args, **kwargs)

    fitting.GraftTrainer.training_step = diverge  # type: ignore[method-assign]
    seen["diverged"] = _refused(_config(data, folder / "diverged", "lora", checkpoint_every=100))
    seen["diverged early"] = _refused(_config(data, folder / "diverged early", "lora", checkpoint_every=5))
    return seen


@pytest.fixture(scope="module")
def refusals(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("refusals")
    return folder, Launch(_errors, data, folder).results()


@pytest.mark.parametrize(
    ("case", "speaker", "message"),
    [
        ("both", 0, "rank is 17, but model.layers.0"),
        ("second", 1, "nowhere.jsonl"),
        ("per_layer", 0, "per_layer updates each weight before the processes can average"),
        ("keep_base", 0, "keep_base=False trains the base's own storage"),
        ("seeds", 0, r"process 1 differs from process 0 in model\.layers\.0\.self_attn\.q_proj\.A of the adapter; start all processes with the same"),
        ("diverged", 0, r"process 1 differs from process 0 in tensors\.\S+ of the adapter; nothing was saved"),
        ("diverged early", 0, r"process 1 differs from process 0 in tensors\.\S+ of the adapter; nothing was saved"),
    ],
)
def test_an_error_reaches_every_process_and_is_told_once(refusals: Any, case: str, speaker: int, message: str) -> None:
    folder, results = refusals
    kinds, sentences = zip(*(result[case] for result in results), strict=True)
    assert kinds[speaker] == "GraftError"
    assert kinds[1 - speaker] == "ToldElsewhere"
    assert sentences[0] == sentences[1]
    with pytest.raises(GraftError, match=message):
        raise GraftError(sentences[0])
    assert not (folder / case / "adapter_model.safetensors").exists()
    assert not list(folder.glob(f"{case}/checkpoints/*"))
    assert (folder / case / "run.json").exists() == case.startswith("diverged")  # the others fail before anything is written


def test_a_divergence_is_found_at_the_next_checkpoint(refusals: Any) -> None:
    folder, _ = refusals
    assert len(_lines(folder / "diverged early")) == 5
    assert len(_lines(folder / "diverged")) == STEPS


# ---- the command line ------------------------------------------------------------------------------------------------------


def _commands(data: Path, folder: Path) -> dict[str, tuple[Any, str, str]]:
    """Exit code, stdout and stderr of each command on this process."""
    from graft.cli import main

    def run(*options: str, **environment: str) -> tuple[Any, str, str]:
        os.environ.update(environment)
        sys.argv = ["graft", "fit", str(data / "answers.jsonl"), "--model", str(data / "causal"), "--max-length", "32", "--steps", "3", *options]
        out, err = io.StringIO(), io.StringIO()
        code: Any = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as exit:
                code = exit.code or 0
        for name in environment:
            os.environ.pop(name, None)
        return code, out.getvalue(), err.getvalue()

    return {
        "version 1": run("--output", str(folder / "none"), ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"),
        "steps": run("--output", str(folder / "none"), "--steps", "0"),
        "rank": run("--output", str(folder / "none"), "--set", "rank=99"),
        "fits": run("--output", str(folder / "run"), "--set", "rank=3", "--json", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"),
    }


def test_the_command_line_speaks_once(data: Path, tmp_path: Path) -> None:
    first, second = Launch(_commands, data, tmp_path).results()
    for name, sentence in (("version 1", "FSDP version 1"), ("steps", "the setting 'steps' is 0"), ("rank", "rank is 99, but")):
        code, out, err = first[name]
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert sentence in err
        assert second[name] == (2, "", "")
    assert not (tmp_path / "none").exists()
    code, out, err = first["fits"]
    assert code == 0, err
    run = json.loads(out)
    assert (run["state"], run["processes"], run["config"]["shard"]) == ("finished", 2, True)
    assert "loss" in err  # the bar
    assert second["fits"] == (0, "", "")


@pytest.mark.real
@pytest.mark.parametrize(
    ("launcher", "shard"),
    [
        (("torch.distributed.run", "--nproc-per-node", "2", "-m", "graft"), False),
        (("accelerate.commands.launch", "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2", "-m", "graft"), True),
    ],
)
def test_real_launchers(data: Path, tmp_path: Path, launcher: tuple[str, ...], shard: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    port_option = "--master-port" if launcher[0].startswith("torch") else "--main_process_port"
    options = ["fit", str(data / "answers.jsonl"), "--model", str(data / "causal"), "--steps", "3", "--max-length", "32", "--set", "rank=3"]
    result = subprocess.run(
        [sys.executable, "-m", launcher[0], port_option, port, *launcher[1:], *options, "--output", str(tmp_path / "run"), "--json"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    run = json.loads(result.stdout)
    assert (run["processes"], run["config"]["shard"]) == (2, shard)
    assert graft.load_adapter(graft.load(data / "causal")[0], tmp_path / "run").step == 3


# ---- other people's loops --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _group() -> Iterator[None]:
    assert distributed.start() is False
    try:
        yield
    finally:
        distributed.stop()


LOOPS: dict[str, dict[str, Any]] = {"lora": {"rank": 3}, "adalora": {"rank": 2, "initial_rank": 4, "interval": 2, "warmup": 0.2, "final": 0.3}}


LOOPS_WATCHED = ("full", "lora")


def _even_batches() -> list[dict[str, Tensor]]:
    """Four rows with as many labels each, so that the mean over two halves is the mean over all."""
    batches = tiny.causal_batches(3)
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        batch["labels"] = batch["input_ids"].clone()
    return batches


def _plain_loops(batches: list[dict[str, Tensor]], folder: Path) -> dict[str, Any]:
    """A user's own loops: torch's DistributedDataParallel around the model, and FSDP2 over the base with shard()."""
    found: dict[str, Any] = {}
    with _group():
        rank = distributed.rank()
        halves = [{name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()} for batch in batches]
        for method, settings in LOOPS.items():
            model = tiny.llama()
            adapter = graft.attach(model, method, seed=3, **settings)
            optimizer = adapter.optimizer(1e-2, 10)
            tiny.train(nn.parallel.DistributedDataParallel(model), optimizer, halves, 10)
            distributed.check_equal(adapter)
            found[method] = {name: value.clone() for name, value in adapter.tensors().items()}

        model = tiny.llama()
        optimizer = graft.attach(model, "lisa", **METHODS["lisa"]["settings"]).optimizer(1e-2, 10)
        try:
            tiny.train(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), optimizer, halves, 1)
        except GraftError as error:
            found["lisa"] = str(error)

        for method in LOOPS_WATCHED:
            model = tiny.llama(tied=True)
            adapter = graft.attach(model, method, seed=3, **LOOPS.get(method, {}))
            found[f"{method} kept"] = _shard_and_watch(model, adapter)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        optimizer = adapter.optimizer(1e-2, 10)
        for batch in halves:
            model.train()
            model(**batch).loss.backward()
            distributed.average_gradients(adapter.parameters())
            optimizer.step()
            optimizer.zero_grad()
        distributed.check_equal(adapter)
        found["sharded"] = {name: value.clone() for name, value in adapter.tensors().items()}
        if rank == 0:
            adapter.save(folder / "by hand")
        graft.detach(model)
        found["given back"] = all(p.requires_grad for p in model.parameters())

        # Different starts: the first process's is everybody's, random bases included.
        for method, settings in {"randlora": {"rank": 4, "save_bases": False}, "lora": {"rank": 3}}.items():
            adapter = graft.attach(tiny.llama(), method, seed=rank, **settings)
            distributed.synchronise(adapter)
            distributed.check_equal(adapter)
            found[f"{method} start"] = {name: value.clone() for name, value in distributed._tensors(adapter).items()}

        # One process resumed and the other did not, because it does not see the folder.
        adapter.step = rank
        try:
            distributed.synchronise(adapter)
        except GraftError as error:
            found["step"] = str(error)

        # What goes wrong when everything is sharded, adapter and all.
        model = tiny.llama()
        adapter = graft.attach(model, "lora", rank=3)
        torch.distributed.fsdp.fully_shard(model)
        refused = {
            "save": lambda: adapter.save(folder / "pieces"),
            "fingerprint": lambda: graft.core.hashing.fingerprint(model),
            "merge": adapter.merge,
        }
        for path, work in refused.items():
            try:
                work()
            except GraftError as error:
                found[path] = str(error)

        # A gradient that only one process has counts as zero on the other; one that nobody has stays away.
        first, second, third = (nn.Parameter(torch.zeros(2)) for _ in range(3))
        first.grad = torch.full((2,), 1.0 + rank)
        if rank == 1:
            second.grad = torch.ones(2)
        distributed.average_gradients([first, second, third])
        found["averages"] = [None if p.grad is None else p.grad.tolist() for p in (first, second, third)]
    return found


def _shard_and_watch(model: nn.Module, adapter: graft.Adapter) -> list[int]:
    """How many whole base weights are still in memory before the root is sharded, after the blocks, and at the end."""
    whole = [weakref.ref(p) for name, p in model.named_parameters() if ".graft." not in f".{name}"]
    alive: list[int] = []
    fully_shard = torch.distributed.fsdp.fully_shard

    def watch(module: nn.Module, **options: Any) -> nn.Module:
        if module is model:
            gc.collect()
            alive.append(sum(ref() is not None for ref in whole))
        return fully_shard(module, **options)

    torch.distributed.fsdp.fully_shard = watch
    try:
        distributed.shard(model, adapter)
    finally:
        torch.distributed.fsdp.fully_shard = fully_shard
    gc.collect()
    return [*alive, sum(ref() is not None for ref in whole)]


def _every_method(batches: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """The losses of each method of the catalogue on a sharded base."""
    found = {}
    with _group():
        rank = distributed.rank()
        halves = [{name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()} for batch in batches]
        for method in graft.methods():
            model = tiny.llama()
            adapter = graft.attach(model, method.name, seed=3, calibration=batches, **tiny.settings(method.name))
            distributed.shard(model, adapter)
            optimizer = adapter.optimizer(1e-2, 5)
            distributed.synchronise(adapter)
            losses = []
            for step in range(5):
                model.train()
                loss = model(**halves[step % 3]).loss
                loss.backward()
                distributed.average_gradients(adapter.parameters())
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            distributed.check_equal(adapter)
            found[method.name] = losses
    return found


def test_every_method_trains_on_a_sharded_base() -> None:
    results = Launch(_every_method, _even_batches()).results()
    for method in graft.methods():
        model = tiny.llama()
        adapter = graft.attach(model, method.name, seed=3, calibration=_even_batches(), **tiny.settings(method.name))
        expected = tiny.train(model, adapter.optimizer(1e-2, 5), _even_batches(), 5)
        seen = [sum(losses) / 2 for losses in zip(*(result[method.name] for result in results), strict=True)]
        assert seen == pytest.approx(expected, rel=1e-5), method.name


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("loops")
    return folder, Launch(_plain_loops, _even_batches(), folder).results()


def _alone(method: str, settings: Mapping[str, Any], steps: int, tied: bool = False) -> graft.Adapter:
    model = tiny.llama(tied=tied)
    adapter = graft.attach(model, method, seed=3, **settings)
    tiny.train(model, adapter.optimizer(1e-2, 10), _even_batches(), steps)
    return adapter


@pytest.mark.parametrize("method", LOOPS)
def test_a_plain_loop_under_distributed_data_parallel(loops: Any, method: str) -> None:
    """Callbacks are bound and the model's own hook runs: AdaLoRA cuts the same ranks."""
    expected = _alone(method, LOOPS[method], 10).tensors()
    for result in loops[1]:
        for name, value in expected.items():
            torch.testing.assert_close(result[method][name], value, rtol=1e-4, atol=1e-6)
    if method == "adalora":
        assert any((value == 0).any() for name, value in expected.items() if name.endswith(".E"))


def test_a_wrapper_that_would_miss_unfrozen_blocks_is_refused(loops: Any) -> None:
    for result in loops[1]:
        assert "LISA unfreezes blocks that DistributedDataParallel does not know; use `graft fit`, or" in result["lisa"]


def test_a_plain_loop_with_a_sharded_base(loops: Any) -> None:
    folder, results = loops
    adapter = _alone("lora", {"rank": 3}, 3, tied=True)
    for result in results:
        for name, value in adapter.tensors().items():
            torch.testing.assert_close(result["sharded"][name], value, rtol=1e-4, atol=1e-6)
        for method in LOOPS_WATCHED:
            assert result[f"{method} kept"] == [2, 0]  # embedding and last norm, then nothing: the whole weights leave memory as they are split
        assert result["given back"]
    loaded = graft.load_adapter(tiny.llama(tied=True), folder / "by hand")
    assert loaded.tensors().keys() == adapter.tensors().keys()
    assert json.loads((folder / "by hand" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_all_start_as_the_first_does(loops: Any) -> None:
    (first, second), alone = loops[1], graft.attach(tiny.llama(), "randlora", seed=0, rank=4, save_bases=False)
    for method in ("randlora", "lora"):
        for name, value in first[f"{method} start"].items():
            assert torch.equal(value, second[f"{method} start"][name]), name
    for name, value in distributed._tensors(alone).items():
        assert torch.equal(value, first["randlora start"][name]), name
    assert first["step"] == second["step"]
    assert "process 1 differs from process 0 in step of the adapter; start all processes with the same" in first["step"]


def test_a_sharded_adapter_is_not_saved(loops: Any) -> None:
    folder, results = loops
    for result in results:
        assert "q_proj.A of adapter 'default' is sharded over processes, so nothing was saved; leave the adapter out of sharding" in result["save"]
        assert "is sharded over processes, so the base has no fingerprint here" in result["fingerprint"]
        assert "is sharded over processes, so it cannot be merged here" in result["merge"]
    assert not (folder / "pieces").exists()


def test_gradients_that_some_processes_lack(loops: Any) -> None:
    for result in loops[1]:
        assert result["averages"] == [[1.5, 1.5], [0.5, 0.5], None]


# ---- without processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.new_empty(0), r"has shape \[0\] instead of \[3, 36\]"),
        (lambda value: value.flatten()[:50], r"has shape \[50\] instead of \[3, 36\]"),
        (lambda value: value.to("meta"), r"holds no values \(device meta\)"),
    ],
)
def test_parts_of_an_adapter_are_not_saved(tmp_path: Path, change: Any, message: str) -> None:
    """What wrappers leave behind on a process that does not own a parameter."""
    model = tiny.llama()
    adapter = graft.attach(model, "lora", rank=3)
    delta = next(iter(adapter.deltas.values()))
    delta.A = nn.Parameter(change(delta.A.detach()))
    with pytest.raises(GraftError, match=rf"q_proj\.A of adapter 'default' {message}, so nothing was saved"):
        adapter.save(tmp_path / "adapter")
    with pytest.raises(GraftError, match=message):
        check_whole(adapter)
    assert not (tmp_path / "adapter").exists()


def test_shares_are_one_batch_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    order = torch.utils.data.SequentialSampler(range(11))
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(distributed.Shares(order, 2)))
        assert len(distributed.Shares(order, 2)) == 2
    assert shares == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10]]]
    assert [list(distributed.Shares(torch.utils.data.SequentialSampler(range(1)), 2))] == [[[]]]


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.start() is False
    assert (distributed.rank(), distributed.world_size(), distributed.gather("x")) == (0, 1, ["x"])
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    distributed.average_gradients([parameter])
    assert parameter.grad.item() == 1
    with pytest.raises(KeyError), distributed.together():
        raise KeyError
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(GraftError, match="a process group of 2 was made by hand; start the processes with torchrun"):
        distributed.start()
    monkeypatch.undo()
    with pytest.raises(GraftError, match="shard splits the base over processes, but there is one"):
        distributed.shard(tiny.llama(), graft.attach(tiny.llama(), "lora", rank=3))
    assert issubclass(ToldElsewhere, GraftError)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (FSDP, True),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, True),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, False),
        ({**FSDP, "FSDP_VERSION": "1"}, "FSDP version 1, but Graft shards with 2; add --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP with offloading"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "FSDP with activation checkpointing"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for tensor, context or sequence parallelism"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch --cpu starts one process only"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}, False),
    ],
)
def test_what_the_launcher_asks_for(environment: dict[str, str], expected: bool | str) -> None:
    if isinstance(expected, bool):
        assert distributed._asks_to_shard(environment) is expected
        return
    with pytest.raises(GraftError, match=expected):
        distributed._asks_to_shard(environment)
