"""graft inspect"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli import show


def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what an adapter folder holds, without its base model.

    Example: graft inspect runs/reviews
    """
    facts = _facts(Path(adapter))
    if json_:
        show.print_json(facts)
        return
    rows = [(name, value) for name, value in facts.items() if name != "targets"]
    show.print_table(adapter, ("what", "value"), rows)
    columns = ("target", "shape", "structure", "norm")
    show.print_table("Targets", columns, [(t["name"], t["shape"], t["structure"], f"{t['norm']:.4g}") for t in facts["targets"]], right=("norm",))


def _facts(path: Path) -> dict[str, Any]:
    from graft.core.storage import PREFIX, TENSORS, read_config, read_tensors

    config, tensors = read_config(path), read_tensors(path)
    ours = config.get("graft", {})
    names = list(ours.get("targets", {})) or sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors})
    targets = []
    for name in names:
        own = {key: value for key, value in tensors.items() if key.startswith(f"{PREFIX}{name}.")}
        layout = {key: value for key, value in ours.get("targets", {}).get(name, {}).items() if key not in ("kind", "shape")}
        structure = ", ".join(f"{key} {_short(value)}" for key, value in layout.items() if value or value == 0) or "-"
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in own.values() if value.is_floating_point()))
        targets.append(
            {
                "name": name,
                "shape": " x ".join(map(str, ours.get("targets", {}).get(name, {}).get("shape", []))),
                "structure": structure,
                "norm": norm,
            }
        )
    base = ours.get("base", {})
    return {
        "method": ours.get("method") or f"PEFT {config['peft_type']}",
        "parts": ours.get("parts", {}),
        "base": base.get("name") or config.get("base_model_name_or_path"),
        "base_fingerprint": base.get("fingerprint"),
        "modules_to_save": ours.get("modules_to_save") or config.get("modules_to_save") or [],
        "updates": ours.get("step"),
        "parameters": sum(value.numel() for value in tensors.values() if value.is_floating_point()),
        "bytes": (path / TENSORS).stat().st_size,
        "written_by": f"graft {ours['version']}" if ours else f"peft {config.get('peft_version')}",
        "targets": targets,
    }


def _short(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else f"{value:.4g}" if isinstance(value, float) else str(value)
