"""The answer of a comparison as files: ``report.html`` (one file, opens from disk, needs no network), ``report.md`` and its figure."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from graft.compare.answer import VERDICTS, Answer, Entry
from graft.compare.results import RESULTS, Record
from graft.core.errors import GraftError
from graft.core.storage import write_folder
from graft.data.reading import COLUMNS, Table

HTML, MARKDOWN, FIGURE = "report.html", "report.md", "report.png"
SHOWN_ROWS, SHOWN_LETTERS = 30, 500  # disagreements in the report; letters of a prompt
NAMED_POINTS = 16  # names that find room beside their points in the picture
SMOOTHED = 10  # updates that one point of a learning curve is the mean of
COSTS = (("parameters", "trainable parameters", 1), ("memory_bytes", "peak memory (GB)", 1e-9), ("seconds", "seconds of training", 1))


def write_reports(folder: Path, answer: Answer, test: Table, command: Sequence[str] | None = None) -> None:
    """Writes all three into ``folder``. Raises :class:`GraftError` where the packages for it are missing."""
    try:
        import jinja2
        import plotly  # noqa: F401
    except ImportError as error:
        raise GraftError(f"the report needs {error.name}; run: pip install 'graft[compare]'") from None
    said = shlex.join(command or ["graft", *sys.argv[1:]])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("graft.compare") / "report.html.jinja").read_text(encoding="utf-8"))
    html = template.render(
        answer=answer, rows=[_cells(answer, entry) for entry in answer.entries], columns=_columns(answer), figures=figures(answer),
        disagreements=disagreements(answer, test), conditions=conditions(answer.records, said), plotly=_plotly_source(), title="Graft comparison",
    )  # fmt: skip
    write_folder(folder, {HTML: html.encode(), MARKDOWN: markdown(answer, said).encode(), FIGURE: picture(answer)})


def _plotly_source() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


# ---- the table ----------------------------------------------------------------------------------------------------------


def _columns(answer: Answer) -> list[tuple[str, str]]:
    """Header and explanation of each column."""
    measure = answer.counting[0]["forgetting"]["measure"] if answer.counting[0]["forgetting"] else "loss"
    forgotten = "rise of the loss on general text, nats a token" if measure == "loss" else "cosine distance that text vectors moved"
    return [
        ("method", "as it was asked for; baselines are always there"),
        (answer.measure, "mean over seeds and test rows, with its 95 % interval"),
        ("verdict", "beside the best: tied; seems worse, but for the correction for so many pairs; worse, than somebody, significantly"),
        ("place", "the places that the evidence leaves open"),
        ("parameters", "numbers that were trained"),
        ("adapter", "size of its file"),
        ("memory", "highest resident memory of the training process"),
        ("s / update", "median seconds of an update"),
        ("training", "seconds of the whole training, one run"),
        ("mergeable", "whether the adapted weights can be written into a plain model"),
        ("forgetting", forgotten),
        ("lr", "learning rate chosen on the validation rows"),
        ("seeds", "runs that count"),
    ]


def _cells(answer: Answer, entry: Entry) -> list[tuple[str, Any]]:
    """Each cell as it is shown, and as it sorts."""
    return [
        (entry.name, entry.name),
        (answer.span(entry.quality), entry.quality.mean),
        (verdict := answer.verdict(entry), VERDICTS.index(verdict)),
        (entry.places, entry.place[0] + entry.place[1] / 1000),
        (f"{entry.parameters:,} ({100 * entry.share:.3g} %)" if entry.parameters else "0", entry.parameters),
        (_size(entry.adapter_bytes), entry.adapter_bytes),
        (_size(entry.memory_bytes), entry.memory_bytes),
        (f"{entry.step_seconds:.2f}" if entry.step_seconds else "-", entry.step_seconds or 0),
        (f"{entry.seconds:.0f}", entry.seconds),
        (entry.mergeable, entry.mergeable),
        (f"{entry.forgetting:.3f}" if entry.forgetting is not None else "-", entry.forgetting or 0),
        (f"{entry.lr:.1e}" if entry.lr else "-", entry.lr or 0),
        (str(entry.seeds), entry.seeds),
    ]


def _size(count: int) -> str:
    return "-" if not count else f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


# ---- figures ------------------------------------------------------------------------------------------------------------


LINES = {"solid": "-", "dash": "--", "dot": ":"}  # Plotly's and matplotlib's names


def styles(answer: Answer) -> dict[str, tuple[str, str]]:
    """Colour and kind of line of every contender, the same in all figures; where the colours run out, the next kind of line begins."""
    from plotly.colors import qualitative

    colours, names = qualitative.Dark24, sorted({record["contender"] for record in answer.records})
    return {name: (colours[i % len(colours)], list(LINES)[i // len(colours) % len(LINES)]) for i, name in enumerate(names)}


def figures(answer: Answer) -> list[dict[str, str]]:
    """Title, text and Plotly JSON of every figure."""
    import plotly.graph_objects as go

    found: list[tuple[str, str, Any]] = []
    lines = {name: {"color": colour, "dash": dash} for name, (colour, dash) in styles(answer).items()}
    for key, label, unit in COSTS:
        shown = [entry for entry in answer.entries if getattr(entry, key)]
        if shown:
            figure = go.Figure([_point(go, answer, entry, unit * getattr(entry, key), lines[entry.name]["color"]) for entry in shown])
            figure.update_xaxes(title=label, type="log")
            figure.update_yaxes(title=answer.measure)
            found.append((f"{answer.measure.capitalize()} against {label}", "Up and to the left is better. Bars are 95 % intervals.", figure))
    curves = [(record, record.curve()) for record in answer.counting if record["seed"] == 0]
    figure = go.Figure([
        go.Scatter(
            x=[x for x, _ in points], y=[y for _, y in points], mode="lines", name=_short(record["contender"]), line=lines[record["contender"]]
        )
        for record, points in ((record, smoothed(curve)) for record, curve in curves) if points
    ])  # fmt: skip
    figure.update_xaxes(title="update")
    figure.update_yaxes(title="training loss")
    found.append(("Learning curves", f"Training loss of seed 0 with the chosen learning rate, means of {SMOOTHED} updates.", figure))
    figure = go.Figure([
        go.Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="lines+markers", name=_short(name), line=lines[name])
        for name, points in searches(answer).items()
    ])  # fmt: skip
    figure.update_xaxes(title="learning rate", type="log")
    figure.update_yaxes(title="validation loss")
    found.append(("Search for the learning rate", "Loss on the validation rows, seed 0. The same rates were tried for every method.", figure))
    names = [entry.name for entry in answer.entries]
    figure = go.Figure(_differences(go, answer, names))
    for axis in (figure.update_xaxes, figure.update_yaxes):
        axis(tickvals=names, ticktext=[_short(name) for name in names])
    figure.update_yaxes(autorange="reversed")
    text = "Row minus column; a star marks differences that stay significant after correcting for all pairs (Holm, 5 %)."
    found.append(("Paired differences", text, figure))
    for name, table in moved_ranks(answer).items():
        roles, depths = sorted({role for role, _ in table}), sorted({depth for _, depth in table})
        z = [[table.get((role, depth)) for depth in depths] for role in roles]
        figure = go.Figure(go.Heatmap(z=z, x=[str(depth) for depth in depths], y=roles, colorscale="Viridis", colorbar={"title": "rank"}))
        figure.update_xaxes(title="block")
        found.append((f"Ranks of {name}", "Where the method put its ranks, seed 0.", figure))
    return [{"title": title, "text": text, "json": _json(figure)} for title, text, figure in found if figure.data]


def _json(figure: Any) -> str:
    """The figure for a script element: nothing in it can end the element."""
    figure.update_layout(
        template="plotly_white", margin={"l": 60, "r": 16, "t": 16, "b": 56}, height=420, legend={"orientation": "h", "y": -0.25},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 12}, xaxis_automargin=True, yaxis_automargin=True,
    )  # fmt: skip
    return json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c")


def _point(go: Any, answer: Answer, entry: Entry, x: float, colour: str) -> Any:
    sign = 1 if answer.measure == "accuracy" else -1
    ends = (entry.quality.low, entry.quality.high) if sign == 1 else (-entry.quality.high, -entry.quality.low)
    middle = sign * entry.quality.mean
    return go.Scatter(
        x=[x], y=[middle], name=_short(entry.name), mode="markers", text=[entry.name],
        marker={"size": 11, "symbol": "diamond" if entry.baseline else "circle", "color": colour},
        error_y={"type": "data", "array": [ends[1] - middle], "arrayminus": [middle - ends[0]], "thickness": 1},
        hovertemplate=f"<b>%{{text}}</b><br>{answer.span(entry.quality)}<br>%{{x:,.4~g}}<extra></extra>",
    )  # fmt: skip


def smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of :data:`SMOOTHED` neighbouring updates."""
    pieces = [curve[start : start + SMOOTHED] for start in range(0, len(curve), SMOOTHED)]
    return [(piece[-1][0], sum(loss for _, loss in piece) / len(piece)) for piece in pieces]


def searches(answer: Answer) -> dict[str, list[tuple[float, float]]]:
    """For each contender the validation loss of every learning rate that was tried with seed 0."""
    found: dict[str, dict[float, float]] = {}
    for record in answer.records:
        if record["lr"] is not None and record["seed"] == 0 and record["validation"]:
            found.setdefault(record["contender"], {})[record["lr"]] = record["validation"]["loss"]
    return {name: sorted(points.items()) for name, points in found.items()}


def _differences(go: Any, answer: Answer, names: Sequence[str]) -> Any:
    by_pair = {}
    for pair in answer.pairs:
        by_pair[pair.first, pair.second] = (pair.difference.mean, pair.p, pair.significant)
        by_pair[pair.second, pair.first] = (-pair.difference.mean, pair.p, pair.significant)
    unit = 100 if answer.measure == "accuracy" else 1
    z = [[unit * by_pair[a, b][0] if a != b else None for b in names] for a in names]
    stars = [["*" if a != b and by_pair[a, b][2] else "" for b in names] for a in names]
    hover = [[f"{a} - {b}: {unit * by_pair[a, b][0]:+.3g}, p = {by_pair[a, b][1]:.2g}" if a != b else "" for b in names] for a in names]
    return go.Heatmap(
        z=z, x=list(names), y=list(names), text=stars, texttemplate="%{text}", customdata=hover, hovertemplate="%{customdata}<extra></extra>",
        colorscale="RdBu", zmid=0, colorbar={"title": "points" if unit == 100 else "nats"},
    )  # fmt: skip


def moved_ranks(answer: Answer) -> dict[str, dict[tuple[str, int], int]]:
    """For each contender that moved ranks: the rank by (role, block) of its first seed."""
    found: dict[str, dict[tuple[str, int], int]] = {}
    for record in answer.counting:
        if record["ranks"] and record["contender"] not in found:
            table = {}
            for name, rank in record["ranks"].items():
                parts = name.split(".")
                numbers = [int(part) for part in parts if part.isdigit()]
                table[".".join(parts[-2:]), numbers[0] if numbers else 0] = rank
            found[record["contender"]] = table
    return found


# ---- rows and conditions -------------------------------------------------------------------------------------------------


def disagreements(answer: Answer, test: Table) -> list[dict[str, Any]]:
    """Test rows that the best three contenders, by the majority of their seeds, do not agree on."""
    names = [entry.name for entry in answer.entries[:3]]
    said = {
        name: [_majority([seed[row]["said"] for seed in answer.predictions[name]]) for row in range(len(test))]
        for name in names
        if _says(answer, name)
    }
    if len(said) < 2:
        return []
    ask, right = COLUMNS[test.kind][0], COLUMNS[test.kind][1]
    found = []
    for index, row in enumerate(test.rows):
        answers = {name: said[name][index] for name in said}
        if len(set(answers.values())) > 1:
            text = row[ask] if len(row[ask]) <= SHOWN_LETTERS else f"{row[ask][:SHOWN_LETTERS]} …"
            found.append({"row": index, "text": text, "right": row[right], "answers": answers})
    return found[:SHOWN_ROWS]


def _says(answer: Answer, name: str) -> bool:
    return all("said" in row for seed in answer.predictions[name] for row in seed[:1])


def _majority(said: Sequence[str]) -> str:
    """What most seeds said; the first of those that tie, in the alphabet."""
    return min(set(said), key=lambda text: (-said.count(text), text))


def conditions(records: Sequence[Record], command: str) -> list[tuple[str, str]]:
    """Under what the runs were made: command, data, base, code, versions, machine; every value that there is."""

    def all_of(value: Any) -> str:
        seen = dict.fromkeys(value(record) for record in records if value(record))
        return "; ".join(seen)

    first = records[0]
    return [
        ("command", command),
        ("rows", all_of(lambda r: ", ".join(f"{count} {name}" for name, count in r["data"]["rows"].items()))),
        ("data (sha256)", all_of(lambda r: ", ".join(f"{name} {value[:12]}" for name, value in r["data"]["hashes"].items()))),
        ("base model", all_of(lambda r: f"{r['base']['name']} {(r['base']['fingerprint'] or '')[:12]}" if r["base"] else "")),
        ("seeds", ", ".join(map(str, sorted({r["seed"] for r in records if r["seed"] is not None})))),
        ("answers", first["rule"] or all_of(lambda r: r["rule"])),
        ("code (sha256)", all_of(lambda r: r["code"][:12])),
        ("versions", all_of(lambda r: ", ".join(f"{name} {number}" for name, number in sorted(r["versions"].items())))),
        ("machine", all_of(lambda r: ", ".join(f"{value} {key}" if key == "threads" else str(value) for key, value in (r["machine"] or {}).items()))),
        ("runs at a time", all_of(lambda r: str(r["jobs"]))),
    ]  # fmt: skip


# ---- Markdown -----------------------------------------------------------------------------------------------------------


def markdown(answer: Answer, command: str) -> str:
    """The answer, the table and the conditions as Markdown."""
    header = [name for name, _ in _columns(answer)]
    lines = ["# Comparison", "", answer.text, "", _markdown_row(header), _markdown_row(["---"] * len(header))]
    lines += [_markdown_row([cell for cell, _ in _cells(answer, entry)]) for entry in answer.entries]
    lines += ["", *(f"- **{name}**: {about}." for name, about in _columns(answer)), ""]
    lines += [f"![{answer.measure} against cost, and learning curves]({FIGURE})", "", "## Conditions", ""]
    lines += [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in conditions(answer.records, command)]
    return "\n".join([*lines, "", f"Every run is in [{RESULTS}]({RESULTS}).", ""])


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def worth_naming(answer: Answer, cost: str) -> set[str]:
    """Points of the picture that bear their name: all of a few; of many the best for what they cost, the baselines and the last."""
    entries = answer.entries
    if len(entries) <= NAMED_POINTS:
        return {entry.name for entry in entries}
    front = (entry for i, entry in enumerate(entries) if all(getattr(entry, cost) < getattr(ahead, cost) for ahead in entries[:i]))
    return {entries[-1].name, *(entry.name for entry in front), *(entry.name for entry in entries if entry.baseline)}


def picture(answer: Answer) -> bytes:
    """Quality against parameters, memory and time, and the learning curves, as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sign, style = 1 if answer.measure == "accuracy" else -1, styles(answer)
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    for axis, (key, label, unit) in zip(axes.flat, COSTS, strict=False):
        named = worth_naming(answer, key)
        for entry in answer.entries:
            if x := unit * getattr(entry, key):
                mean, ends = sign * entry.quality.mean, sorted((sign * entry.quality.low, sign * entry.quality.high))
                bars = [[max(0.0, mean - ends[0])], [max(0.0, ends[1] - mean)]]
                axis.errorbar([x], [mean], bars, fmt="D" if entry.baseline else "o", capsize=2, elinewidth=1, color=style[entry.name][0])
                if entry.name in named:
                    axis.annotate(_short(entry.name), (x, mean), xytext=(4, 4), textcoords="offset points", fontsize=8).set_in_layout(False)
        axis.set(xscale="log", xlabel=label, ylabel=answer.measure)
        _ticks(axis.xaxis, thousands=key == "parameters")
    for record in answer.counting:
        if record["seed"] == 0 and (points := smoothed(record.curve())):
            colour, line = style[record["contender"]]
            axes[1, 1].plot([x for x, _ in points], [y for _, y in points], LINES[line], color=colour, label=_short(record["contender"]))
    axes[1, 1].set(xlabel="update", ylabel="training loss", yscale="log")
    _ticks(axes[1, 1].yaxis)
    figure.legend(loc="outside lower center", fontsize=8, ncols=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return content.getvalue()


def _ticks(axis: Any, thousands: bool = False) -> None:
    """Plain numbers on a logarithmic axis: 1 2 5 10 ..., or 1k 10k ... where they span many decades."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1,) if thousands else (1, 2, 5)))
    axis.set_major_formatter(EngFormatter(sep="") if thousands else "{x:g}")
    axis.set_minor_formatter(NullFormatter())
