"""One self-contained page from the JSON files of `eval`, `reproduce` and `bench generate`: plots, then their tables."""

from __future__ import annotations

import html
import json
import math
import shlex
from pathlib import Path

from .peers import PEERS
from .recipes import RECIPES
from .results import render
from .simulated import SIMULATED

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 20, 46
KINDS = {"halfbyte": "a", "halfbyte, simulated": "b", "others, simulated": "c"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #c9ced6; --faint: #6a737d;
  --a: #0b63c5; --b: #1a8a4a; --c: #b4530a; --heat: 11, 99, 197; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171a; --line: #3a4048; --faint: #9aa3ad;
  --a: #6cb2ff; --b: #5fd08f; --c: #f2a65a; --heat: 108, 178, 255; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 760px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg .small { font-size: 10px; } svg .faint { fill: var(--faint); }
.a { fill: var(--a); stroke: var(--a); color: var(--a); }
.b { fill: var(--b); stroke: var(--b); color: var(--b); }
.c { fill: var(--c); stroke: var(--c); color: var(--c); }
svg path.a, svg path.b, svg path.c { fill: none; stroke-width: 2; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.15rem 0.5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.legend span { margin-right: 1.2rem; }
.legend b { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em;
  border-radius: 50%; background: currentColor; }
footer { color: var(--faint); font-size: 0.8rem; margin-top: 3rem; overflow-wrap: anywhere; }
"""


class _Scale:
    """Values to pixels along one axis, linear or logarithmic, with a few round marks."""

    def __init__(self, values, start, end, log=False):
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        if log:
            self.low, self.high = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
        else:
            room = (high - low or 1) * 0.06
            self.low, self.high = low - room, high + room

    def __call__(self, value):
        position = math.log10(value) if self.log else value
        return self.start + (position - self.low) / (self.high - self.low or 1) * (self.end - self.start)

    def marks(self):
        if self.log:
            return [10.0**power for power in range(self.low, self.high + 1)]
        step = 10 ** math.floor(math.log10(self.high - self.low))
        step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if (self.high - self.low) / (step * part) <= 8)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def _svg(parts, label, height=HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}">' + "".join(parts) + "</svg>"
    )


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = [f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}"/>']
    for mark in x.marks():
        parts.append(f'<text x="{x(mark):.1f}" y="{floor + 18}" text-anchor="middle">{mark:g}</text>')
    for mark in y.marks():
        parts.append(f'<path class="axis" stroke-dasharray="2 4" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    parts.append(
        f'<text class="faint" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    parts.append(f'<text class="faint" x="{LEFT + 6}" y="{TOP + 4}">{html.escape(y_label)}</text>')
    return parts


def kind_of(recipe: str) -> str:
    """Whose a row of `eval` is."""
    names = {"halfbyte, simulated": SIMULATED, "others, simulated": PEERS}
    return next((kind for kind, of_kind in names.items() if recipe in of_kind), "halfbyte")


def frontier(rows: list[dict]) -> list[dict]:
    """The rows that no other one beats at as few bits, by bits."""
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda row: (row["bits"], row["kl"])):
        if row["kl"] < best:
            best = row["kl"]
            kept.append(row)
    return kept


class _Labels:
    """Puts names beside points, each above those that are in its way."""

    def __init__(self):
        self.taken = []

    def place(self, name, x, y) -> str:
        right = x + 6 * len(name)
        while any(x < end and right > start and abs(y - line) < 11 for start, end, line in self.taken):
            y -= 11
        self.taken.append((x, right, y))
        return f'<text class="small" x="{x:.1f}" y="{y:.1f}">{html.escape(name)}</text>'


def pareto(rows: list[dict]) -> str:
    """Bits a value against KL, logarithmic; the line joins what nothing beats."""
    rows = [row for row in rows if row["kl"] > 0]
    x = _Scale([row["bits"] for row in rows], LEFT, WIDTH - RIGHT)
    y = _Scale([row["kl"] for row in rows], HEIGHT - BOTTOM, TOP, log=True)
    parts = _axes(x, y, "bits a value, scales included", "KL to the full cache, nats a token")
    points = " L".join(f"{x(row['bits']):.1f} {y(row['kl']):.1f}" for row in frontier(rows))
    parts.append(f'<path class="axis" fill="none" d="M{points}"/>')
    named = {row["recipe"] for row in frontier(rows)} | set(RECIPES)
    labels = _Labels()
    for row in sorted(rows, key=lambda row: row["kl"]):
        at = f"{row['recipe']}: {row['bits']:.3g} bits, KL {row['kl']:.3g}"
        mark = KINDS[kind_of(row["recipe"])]
        place = f'cx="{x(row["bits"]):.1f}" cy="{y(row["kl"]):.1f}"'
        parts.append(f'<circle class="{mark}" {place} r="4"><title>{html.escape(at)}</title></circle>')
        if row["recipe"] in named:
            parts.append(labels.place(row["recipe"], x(row["bits"]) + 7, y(row["kl"]) + 4))
    legend = "".join(f'<span><b class="{mark}"></b>{kind}</span>' for kind, mark in KINDS.items())
    return f'<p class="legend">{legend}</p>' + _svg(parts, "Bits a value against KL")


def bars(rows: list[dict], key: str = "kl") -> str:
    """One bar a line, logarithmic."""
    rows = [row for row in rows if row.get(key)]
    height = 30 * len(rows) + 40
    x = _Scale([row[key] for row in rows], 300, WIDTH - 80, log=True)
    parts = []
    for i, row in enumerate(rows):
        y = 20 + 30 * i
        parts.append(f'<text x="290" y="{y + 14}" text-anchor="end" class="small">{html.escape(row["line"])}</text>')
        parts.append(f'<rect class="a" x="300" y="{y}" width="{max(x(row[key]) - 300, 1):.1f}" height="18"/>')
        parts.append(f'<text x="{x(row[key]) + 6:.1f}" y="{y + 14}">{row[key]:.3g}</text>')
    return _svg(parts, "KL of each line", height)


def heat(rows: list[dict]) -> str:
    """KL of each layer's K and V packed alone: darker loses more."""
    cells = {tuple(row["line"].split()[1:]): row["kl"] for row in rows}
    layers = sorted({int(layer) for layer, _ in cells})
    most = max(cells.values()) or 1.0
    size = min(60, (WIDTH - 80) / len(layers))
    parts = []
    for column, layer in enumerate(layers):
        x = 60 + column * size
        parts.append(f'<text x="{x + size / 2:.1f}" y="14" text-anchor="middle">{layer}</text>')
        for line, which in enumerate("KV"):
            value = cells.get((str(layer), which), 0.0)
            fill = f"rgba(var(--heat), {0.08 + 0.92 * value / most:.2f})"
            parts.append(
                f'<rect x="{x:.1f}" y="{20 + line * 40}" width="{size - 2:.1f}" height="38" style="fill: {fill}">'
                f"<title>layer {layer} {which}: {value:.3g}</title></rect>"
            )
    parts += [f'<text x="40" y="{44 + line * 40}" text-anchor="end">{which}</text>' for line, which in enumerate("KV")]
    return _svg(parts, "KL by layer and side", 110)


def lines(rows: list[dict], keys: dict[str, str], y_label: str) -> str:
    """Rows of `bench generate` against the prefix. keys: {row key: name}."""
    x = _Scale([row["prefix"] for row in rows], LEFT, WIDTH - RIGHT, log=True)
    y = _Scale([row[key] for row in rows for key in keys], HEIGHT - BOTTOM, TOP)
    parts = _axes(x, y, "prefix, tokens", y_label)
    for (key, name), mark in zip(keys.items(), ("c", "a"), strict=True):
        points = [(x(row["prefix"]), y(row[key])) for row in sorted(rows, key=lambda row: row["prefix"])]
        parts.append(f'<path class="{mark}" d="M' + " L".join(f"{a:.1f} {b:.1f}" for a, b in points) + '"/>')
        parts.append(f'<text x="{points[-1][0] - 4:.1f}" y="{points[-1][1] - 8:.1f}" text-anchor="end">{name}</text>')
    return _svg(parts, y_label)


def table(rows: list[dict]) -> str:
    """Rows as they are; columns that are empty in all of them are left out."""
    keys = [
        k for k in rows[0] if not isinstance(rows[0][k], list | dict) and any(row[k] not in (None, "") for row in rows)
    ]
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(render(row[key]))}</td>" for key in keys) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def read_documents(paths) -> list[dict]:
    """The JSON files that commands wrote; ValueError naming one that is not."""
    documents = []
    for path in paths:
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            document["rows"][0].keys()
            shlex.split(document["command"])
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"json: {str(path)!r} is not a file that --json wrote: {error}") from error
        documents.append(document)
    return documents


def model_of(document: dict) -> str:
    """What a command was told to measure; the default where it was not."""
    words = shlex.split(document["command"])
    return words[words.index("--model") + 1] if "--model" in words[:-1] else "tiny-qwen"


def evaluated_rows(documents: list[dict]) -> dict[str, list[dict]]:
    """{model: rows} of the files of `eval`, those of one model joined."""
    found: dict[str, list] = {}
    for document in documents:
        if "recipe" in document["rows"][0] and "kl" in document["rows"][0]:
            found.setdefault(model_of(document), []).extend(document["rows"])
    return found


def sections(documents: list[dict]):
    """(heading, HTML) in the order they are read."""
    for model, rows in evaluated_rows(documents).items():
        yield f"Bits against loss, {model}", pareto(rows) + table(sorted(rows, key=lambda row: row["bits"]))
    for document in documents:
        model, rows = model_of(document), document["rows"]
        if "fp_ms_per_token" in rows[0]:
            for dtype_rows in ([row for row in rows if row["model"] == name] for name in {r["model"] for r in rows}):
                name = dtype_rows[0]["model"]
                time = {"fp_ms_per_token": "full cache", "int4_ms_per_token": "packed cache"}
                held = {"fp_cache_bytes": "full cache, bfloat16", "int4_cache_bytes": "packed cache"}
                yield (
                    f"Time and memory against context, {name}",
                    (
                        lines(dtype_rows, time, "ms a token")
                        + lines(dtype_rows, held, "bytes of cache")
                        + table(dtype_rows)
                    ),
                )
        for name in dict.fromkeys(row["table"] for row in rows if "table" in row):
            own = [row for row in rows if row["table"] == name]
            shown = [{key: value for key, value in row.items() if key != "table"} for row in own]
            plot = heat(own) if name == "layers" else "" if name == "memory" else bars(own)
            yield f"{name.capitalize()}, {model}", plot + table(shown)


def plot_pareto(paths, file) -> None:
    """The rows of all `eval` files as one PNG, a panel a model: bits against KL, with what nothing beats joined."""
    from .plots import figure, save

    found = evaluated_rows(read_documents(paths))
    if not found:
        raise ValueError("json: none of the files is of `eval`")
    drawn, panels = figure(6.2 * len(found), 4.6, ncols=len(found), squeeze=False)
    colors = dict(zip(KINDS, ("#0b5cad", "#1a8a4a", "#c2570c"), strict=True))
    for panel, (model, rows) in zip(panels[0], found.items(), strict=True):
        rows = [row for row in rows if row["kl"] > 0 and row["bits"] < 9]
        best = frontier(rows)
        panel.plot([row["bits"] for row in best], [row["kl"] for row in best], color="#8b949e", linewidth=1)
        for kind, color in colors.items():
            own = [row for row in rows if kind_of(row["recipe"]) == kind]
            panel.scatter([row["bits"] for row in own], [row["kl"] for row in own], color=color, label=kind, zorder=3)
        panel.set(title=model, xlabel="bits a value, scales included", yscale="log")
    panels[0][0].set_ylabel("KL to the full cache, nats a token")
    panels[0][-1].legend()
    save(drawn, file)


def write_report(paths, out) -> int:
    """Writes the page to `out`; returns how many sections it has. paths: JSON files of `eval`, `reproduce`, `bench`."""
    documents = read_documents(paths)
    parts = list(sections(documents))
    if not parts:
        raise ValueError("json: none of the files is of `eval`, `reproduce` or `bench generate`")
    facts = "".join(
        f"<p>{html.escape(document['command'])}<br>commit {html.escape(document['commit'])}, "
        f"{html.escape(document['machine']['cpu'])}, {document['machine']['cores']} cores</p>"
        for document in documents
    )
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>{content}</section>" for heading, content in parts)
    Path(out).write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Halfbyte: quality report</title><style>{STYLE}</style></head><body>"
        f"<h1>Halfbyte: quality report</h1>{body}<footer>{facts}</footer></body></html>\n",
        encoding="utf-8",
    )
    return len(parts)
