"""graft inspect"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli import show
from graft.core.errors import GraftError


def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter.")],
    plan: Annotated[bool, typer.Option("--plan", help="In which order its products are computed in training on this machine.")] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="With --plan: tokens in a batch. [default: 1024]", show_default=False)] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what an adapter folder holds, without its base model.

    Example: graft inspect runs/reviews --plan --rows 2048
    """
    if rows is not None and not plan:
        raise GraftError("--rows is the batch that --plan is made for; add --plan, or leave --rows out.")
    if plan:
        rows = rows or 1024
        lines = _plans(Path(adapter), rows)
        if json_:
            show.print_json({"rows": rows, "dtype": "float32", "plan": lines})
        else:
            numbers = ("rank", "targets", "operations", "saved")
            show.print_table(f"Order of products in fp32, {rows:,} tokens", tuple(lines[0]), [tuple(line.values()) for line in lines], right=numbers)
        return
    facts = _facts(Path(adapter))
    if json_:
        show.print_json(facts)
        return
    show.print_table(adapter, ("what", "value"), [(name, value) for name, value in facts.items() if name != "targets"])
    columns = ("target", "shape", "structure", "norm")
    show.print_table("Targets", columns, [(t["name"], t["shape"], t["structure"], f"{t['norm']:.4g}") for t in facts["targets"]], right=("norm",))


def _plans(path: Path, rows: int) -> list[dict[str, Any]]:
    """The planner's choice for each distinct shape and rank among the targets that run as low-rank maps."""
    import torch

    from graft.core.storage import read_tensors
    from graft.kernels.plan import THIN, Shape, choose, operations
    from graft.training.rates import use_measured

    tensors = read_tensors(path)
    pairs = [(A, tensors[key.replace("lora_A", "lora_B")]) for key, A in tensors.items() if "lora_A" in key and A.ndim == 2]
    if not pairs:
        raise GraftError(f"{path} holds no factors A and B of linear maps, so there is no order of products to choose.")
    counts = Counter(Shape(rows, A.shape[1], B.shape[0], len(A)) for A, B in pairs)
    use_measured(torch.float32)
    lines = []
    for size, count in counts.items():
        chosen = choose(size, torch.float32)
        thin, own = operations(THIN, size), operations(chosen, size)
        lines.append(
            {
                "shape": f"{size.outputs} x {size.inputs}",
                "rank": size.rank,
                "targets": count,
                **chosen.orders,
                "operations": f"{own:.3g}",
                "saved": f"{1 - own / thin:.0%}",
            }
        )
    return lines


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
