"""Runs of `fit`: what they write, and that a killed and resumed one ends with the same bits as one never killed."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft import GraftError
from graft.training.config import FitConfig
from graft.training.fit import fit
from graft.training.rates import use_measured
from tests import folders

STEPS = 24
SMALL = {
    "lora": {"rank": 3, "dropout": 0.1}, "adalora": {"rank": 2, "initial_rank": 4, "interval": 2}, "galore": {"rank": 4, "update_interval": 5},
    "lisa": {"active_blocks": 1, "interval": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.causal(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.answers(tmp_path_factory.mktemp("data") / "train.jsonl", 20)


def _config(base: Path, rows: Path, output: Path, **changes: Any) -> FitConfig:
    values = {"data": str(rows), "model": str(base), "output": str(output), "steps": STEPS, "batch_size": 3, "max_length": 32, "lr": 5e-3}
    return FitConfig.make(values | {"checkpoint_every": 2} | changes)


@pytest.mark.parametrize("method", sorted(SMALL))
def test_killed_and_resumed_is_never_killed(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    changes = {"method": method, "settings": SMALL[method]}
    whole = _config(model, rows, tmp_path / "whole", **changes)
    run = fit(whole)
    killed = _config(model, rows, tmp_path / "killed", **changes)
    kills = 0
    for wanted in (5, 14):  # between checkpoints, or in the middle of writing one
        kills += _run_and_kill(killed, tmp_path, after=wanted, resume=kills > 0)
    assert kills == 2, "the run ended before it could be killed"
    rates, asked = json.loads((tmp_path / "killed" / "run.json").read_text())["rates"], []
    monkeypatch.setattr("graft.training.fit.use_measured", lambda *given: asked.append(given[-1]) or use_measured(*given))
    resumed = fit(killed, resume=True)
    assert rates
    assert asked == [rates]  # the choices of the run, whatever was measured since
    expected, seen = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert expected.keys() == seen.keys()
    for name, value in expected.items():
        assert torch.equal(value, seen[name]), name
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "killed")]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert run["loss"] == resumed["loss"]


def test_stopped_after_its_last_update_makes_no_other(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"steps": 4, "schedule": "constant"}
    whole = fit(_config(model, rows, tmp_path / "whole", **changes))
    stopped = _config(model, rows, tmp_path / "stopped", **changes)
    with monkeypatch.context() as patch:
        patch.setattr("graft.training.fit._finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(stopped)
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text()
    monkeypatch.chdir(tmp_path)
    resumed = fit(_config(model, rows, Path("stopped"), **changes), resume=True)  # the same folder from another working folder
    expected, seen = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    for name, value in expected.items():
        assert torch.equal(value, seen[name]), name
    assert resumed["loss"] == whole["loss"]
    assert (tmp_path / "stopped" / "metrics.jsonl").read_text() == lines
    assert resumed["step_seconds"] == statistics.median(json.loads(line)["seconds"] for line in lines.splitlines())
    assert resumed["tokens_per_second"] is None


def _run_and_kill(config: FitConfig, tmp_path: Path, after: int, resume: bool) -> int:
    """Starts the run in a process of its own and kills it with SIGKILL once ``after`` updates are on record."""
    script = (
        "import json, sys, time\nfrom graft.training.config import FitConfig\nfrom graft.training.fit import fit\n"
        "fit(FitConfig.make(json.loads(sys.argv[1])), resume=sys.argv[2] == 'True', progress=lambda *_: time.sleep(0.05))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, config.model_dump_json(), str(resume)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    metrics = config.folder / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()[-2000:]
    return int(process.returncode == -signal.SIGKILL)


def test_a_run_writes_what_it_promises(model: Path, rows: Path, tmp_path: Path) -> None:
    config = _config(model, rows, tmp_path / "run", steps=6, settings={"rank": 2})
    seen: list[tuple[int, int]] = []
    run = fit(config, progress=lambda done, total, line: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written == json.loads(json.dumps(run))
    for key in ("config", "versions", "base", "loss", "tokens_per_second", "step_seconds", "peak_memory_bytes", "adapter_bytes"):
        assert written[key], key
    assert written["trainable_parameters"] == sum(2 * (o + i) for o, i in 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)])
    loaded, _ = graft.load(model)
    assert graft.load_adapter(loaded, tmp_path / "run").step == 6
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_head_is_trained_and_saved_with_the_adapter(tmp_path: Path) -> None:
    from graft.data.reading import read
    from graft.models import load_with_adapter
    from graft.training.evaluate import evaluate

    encoder, data = folders.encoder(tmp_path / "encoder"), folders.labels(tmp_path / "train.jsonl", 48)
    fit(_config(encoder, data, tmp_path / "run", steps=60, batch_size=8, lr=1e-2, seed=3, settings={"rank": 4}))
    adapter, tokenizer = load_with_adapter(tmp_path / "run")
    assert adapter.modules_to_save == ("classifier",)
    assert adapter.model.config.id2label == {0: "bad", 1: "good"}
    held_out = read(folders.labels(tmp_path / "test.jsonl", 40, seed=9))
    assert evaluate(adapter.model, tokenizer, held_out).metrics["accuracy"] > 0.9  # chance is one half


def test_a_head_among_the_targets_is_not_trained_twice(tmp_path: Path) -> None:
    encoder, data = folders.encoder(tmp_path / "encoder"), folders.labels(tmp_path / "train.jsonl", 8)
    fit(_config(encoder, data, tmp_path / "run", steps=2, method="full", targets=["all"]))
    kept = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in kept


def test_accumulation_is_one_large_batch(model: Path, rows: Path, tmp_path: Path) -> None:
    """Rows of equal length, so that means of means are the mean: two halves an update give the weights of one whole."""
    data = tmp_path / "even.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{word} film", "answer": "good"}) + "\n" for word in folders.WORDS[:16]))
    fit(_config(model, data, tmp_path / "one", steps=4, batch_size=4, settings={"rank": 2}))
    fit(_config(model, data, tmp_path / "two", steps=4, batch_size=2, accumulation=2, settings={"rank": 2}))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)


def test_the_loss_of_labelled_positions_is_the_models_own(model: Path, rows: Path, tmp_path: Path) -> None:
    """Against transformers itself with all logits: same loss, same gradients, fewer logits."""
    from graft.data.encoding import collator, encode
    from graft.data.reading import read
    from graft.training.fit import GraftTrainer, _arguments

    loaded, tokenizer = graft.load(model)
    encoded = encode(read(rows), tokenizer, 32)
    batch = collator(0)([encoded[i] for i in range(5)])
    asked: list[int] = []
    gradients = []
    for fewer in (True, False):
        adapter = graft.attach(loaded, "lora", rank=2)
        with torch.no_grad():
            for pair in adapter.pairs().values():
                pair.B.fill_(0.01)
        loaded.lm_head.register_forward_hook(lambda module, args, y: asked.append(y.shape[1]))
        trainer = GraftTrainer(loaded, _arguments(_config(model, rows, tmp_path / "run")), train_dataset=encoded)
        loss = trainer.compute_loss(loaded, dict(batch)) if fewer else loaded(**batch).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in adapter.parameters())])
        graft.detach(loaded)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    assert asked[0] < batch["input_ids"].shape[1] == asked[-1]


def test_a_finished_or_another_run_is_not_written_over(model: Path, rows: Path, tmp_path: Path) -> None:
    config = _config(model, rows, tmp_path / "run", steps=2, settings={"rank": 2})
    fit(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(GraftError, match="holds a run already; pass --resume"):
        fit(config)
    with pytest.raises(GraftError, match="is finished; choose another --output"):
        fit(config, resume=True)
    unfinished = json.loads((tmp_path / "run" / "run.json").read_text()) | {"state": "running"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(unfinished))
    with pytest.raises(GraftError, match=r"holds a run with lr = 0\.005, not 0\.1"):
        fit(_config(model, rows, tmp_path / "run", steps=2, lr=0.1, settings={"rank": 2}), resume=True)
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "run.json"}
    assert after == {name: content for name, content in before.items() if name != "run.json"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lra"}, "there is no method 'lra'; did you mean"),
        ({"settings": {"rnk": 2}}, "lora has no option 'rnk'; did you mean 'rank'"),
        ({"settings": {"rank": 0}}, r"LoRA\.rank is 0, but it must be at least 1"),
        ({"settings": {"rank": 17}}, "rank is 17, but model.layers.0.self_attn.k_proj is 16 x 32"),
        ({"targets": "q_prj"}, "no target of LlamaForCausalLM matches 'q_prj'; did you mean 'q_proj'"),
        ({"max_length": 100}, "reads at most 64 tokens"),
        ({"method": "galore", "settings": {"rank": 4, "per_layer": True}}, "per_layer .* excludes clipping and accumulation"),
        ({"model": "smolm2"}, "neither a packaged model nor a folder; did you mean 'smollm2'"),
    ],
)
def test_bad_settings_write_nothing(model: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraftError, match=message):
        fit(_config(model, rows, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_an_encoder_cannot_answer(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="is an encoder, which writes no text; give it rows with text and label"):
        fit(_config(folders.encoder(tmp_path / "encoder"), rows, tmp_path / "run"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "d"}, "the setting 'output' is missing"),
        ({"data": "d", "output": "o", "step": 3}, "there is no setting 'step'; did you mean 'steps'"),
        ({"data": "d", "output": "o", "steps": 0}, "the setting 'steps' is 0: input should be greater than or equal to 1"),
        ({"data": "d", "output": "o", "dtype": "int8"}, "the setting 'dtype' is 'int8'"),
    ],
)
def test_config_values_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(GraftError, match=message):
        FitConfig.make(values)


def test_looking_at_the_model_on_the_way_changes_nothing(model: Path, rows: Path, tmp_path: Path) -> None:
    from graft.data.reading import read
    from graft.training.evaluate import evaluate

    seen: list[tuple[int, float]] = []

    def look(adapter: Any, tokenizer: Any, step: int) -> None:
        seen.append((step, evaluate(adapter.model, tokenizer, read(rows)).metrics["loss"]))

    settings = {"rank": 2, "dropout": 0.1}
    fit(_config(model, rows, tmp_path / "looked", steps=5, settings=settings), look=look)
    fit(_config(model, rows, tmp_path / "blind", steps=5, settings=settings))
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("looked", "blind"))
    assert one == two
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert len({loss for _, loss in seen}) == 5  # and it is the model in training that was seen
