"""The commands as a user types them: right ones, and wrong ones that answer in one sentence with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from graft.cli.app import app
from graft.kernels import plan
from tests import folders

COMMANDS = ("quickstart", "methods", "fit", "eval", "generate", "merge", "convert", "inspect")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.causal(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    data, output = folders.answers(model.parent / "train.jsonl", 64), model.parent / "run"
    result = run(
        "fit",
        data,
        "--model",
        model,
        "--set",
        "rank=8",
        "--steps",
        80,
        "--batch-size",
        8,
        "--max-length",
        32,
        "--lr",
        0.02,
        "--output",
        output,
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["method"] == "lora"
    return output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: graft {command}" in " ".join(result.output.replace("│", " ").split())


def test_the_installed_command_answers_in_one_sentence() -> None:
    result = subprocess.run([Path(sys.executable).parent / "graft", "methods", "lorra"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "graft: there is no method 'lorra'; did you mean 'lora' or 'tlora' or 'slora'?\n"


def test_methods_come_from_the_catalogue() -> None:
    from graft import methods

    listed = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in listed] == [row.name for row in methods()]
    options = json.loads(run("methods", "adalora", "--json").stdout)["options"]
    assert {"rank", "initial_rank", "interval"} <= {o["name"] for o in options}
    assert {o["name"]: o["unit"] for o in options}["interval"] == "updates"


def test_methods_count_parameters_on_a_model(model: Path) -> None:
    counts = {row["name"]: row["parameters"] for row in json.loads(run("methods", "--json", "--model", model).stdout)}
    shapes = 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert counts["lora"] == sum(8 * (o + i) for o, i in shapes)
    assert counts["full"] == sum(o * i for o, i in shapes)


def test_the_adapter_answers_better_than_the_base(model: Path, adapter: Path, tmp_path: Path) -> None:
    held_out = folders.answers(tmp_path / "test.jsonl", 40, seed=5)
    accuracies = []
    for options in (["--model", model], ["--adapter", adapter]):
        result = run("eval", held_out, *options, "--max-length", 32, "--json")
        assert result.exit_code == 0, result.output
        accuracies.append(json.loads(result.stdout)["accuracy"])
    assert accuracies[1] > max(0.9, accuracies[0])


def test_merged_and_converted_models_answer_the_same(model: Path, adapter: Path, tmp_path: Path) -> None:
    held_out = folders.answers(tmp_path / "test.jsonl", 20, seed=6)
    expected = run("generate", "the joy is cold", "--adapter", adapter, "--new-tokens", 6, "--json").stdout
    assert run("merge", adapter, "--output", tmp_path / "merged").exit_code == 0
    assert run("convert", adapter, "--to", "lora", "--output", tmp_path / "lora").exit_code == 0
    assert run("convert", adapter, "--to", "peft", "--output", tmp_path / "peft").exit_code == 0
    assert run("convert", adapter, "--to", "merged", "--output", tmp_path / "merged-2").exit_code == 0
    for options in (
        ["--model", tmp_path / "merged"],
        ["--adapter", tmp_path / "lora"],
        ["--adapter", tmp_path / "peft"],
        ["--model", tmp_path / "merged-2"],
    ):
        said = run("generate", "the joy is cold", *options, "--new-tokens", 6, "--json")
        assert said.stdout == expected, said.output
        assert run("eval", held_out, *options, "--max-length", 32).exit_code == 0


def test_inspect_reads_ours_and_pefts(adapter: Path, tmp_path: Path) -> None:
    facts = json.loads(run("inspect", adapter, "--json").stdout)
    assert (facts["method"], facts["updates"], len(facts["targets"])) == ("lora", 80, 14)
    assert run("convert", adapter, "--to", "peft", "--output", tmp_path / "peft").exit_code == 0
    assert json.loads(run("inspect", tmp_path / "peft", "--json").stdout)["method"] == "PEFT LORA"
    assert run("inspect", adapter).exit_code == 0


def test_inspect_shows_the_planners_choice(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    tensors = load_file(adapter / "adapter_model.safetensors")
    said = json.loads(run("inspect", adapter, "--plan", "--rows", 64, "--json").stdout)
    assert said["rows"] == 64
    assert sum(line["targets"] for line in said["plan"]) == sum("lora_A" in key for key in tensors)
    for line in said["plan"]:
        outputs, inputs = map(int, line["shape"].split(" x "))
        chosen = plan.choose(plan.Shape(64, inputs, outputs, line["rank"]), torch.float32)
        assert {name: line[name] for name in chosen.orders} == chosen.orders
    assert json.loads(run("inspect", adapter, "--plan", "--json").stdout)["rows"] == 1024
    assert "Order of products in fp32, 1,024 tokens" in run("inspect", adapter, "--plan").stdout
    plan.use_rates(None, torch.float32)


def test_options_win_over_the_yaml_file(model: Path, tmp_path: Path) -> None:
    data = folders.answers(tmp_path / "train.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {data}\nmodel: {model}\noutput: {tmp_path / 'run'}\nsteps: 50\nmax_length: 32\nsettings: {{rank: 2}}\nschedule: cosine\n"
    )
    result = run("fit", "--config", config, "--steps", 2, "--set", "alpha=5", "--json")
    assert result.exit_code == 0, result.output
    chosen = json.loads(result.stdout.splitlines()[-1])["config"]
    assert (chosen["steps"], chosen["schedule"], chosen["settings"]) == (2, "cosine", {"rank": 2, "alpha": "5"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "--axis", "inits"], "no method lies on the axis 'inits'; did you mean 'init'"),
        (["fit", "nowhere.jsonl", "--output", "OUT"], "there is no data file nowhere.jsonl"),
        (["fit", "DATA", "--model", "MODEL", "--output", "OUT", "--set", "rank"], "--set takes name=value"),
        (["fit", "DATA", "--model", "MODEL", "--output", "OUT", "--set", "rank=two"], "LoRA.rank is 'two', but it must be of type int"),
        (["fit", "DATA", "--model", "MODEL", "--output", "OUT", "--dtype", "fp8"], "the setting 'dtype' is 'fp8'"),
        (["fit", "DATA", "--model", "MODEL"], "the setting 'output' is missing"),
        (["fit", "--config", "nowhere.yaml"], "there is no config file nowhere.yaml"),
        (["eval", "DATA", "--adapter", "nowhere"], "nowhere is not a folder; an adapter is a folder with"),
        (["eval", "DATA", "--model", "no-such"], "'no-such' is neither a packaged model nor a folder"),
        (["generate", "hi", "--model", "./no-such"], "there is no model folder ./no-such"),
        (["generate", "hi", "--model", "ADAPTER"], "is an adapter, not a base model"),
        (["merge", "ADAPTER", "--output", "MODEL"], "exists already; choose another --output"),
        (["convert", "ADAPTER", "--to", "lora", "--output", "MODEL"], "exists already; choose another --output"),
        (["convert", "ADAPTER", "--to", "peft", "--output", "OUT", "--rank", "2"], "--rank is for --to lora, and this is --to peft"),
        (["convert", "ADAPTER", "--to", "lora", "--output", "OUT", "--dtype", "bfloat16"], "--dtype is for --to merged"),
        (["inspect", "MODEL"], "has no adapter_model.safetensors"),
        (["inspect", "ADAPTER", "--rows", "8"], "--rows is the batch that --plan is made for"),
    ],
)
def test_mistakes_are_one_sentence(model: Path, adapter: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"MODEL": model, "ADAPTER": adapter, "OUT": tmp_path / "out", "DATA": folders.answers(tmp_path / "train.jsonl")}
    result = run(*(places.get(a, a) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("graft: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
