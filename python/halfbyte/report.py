"""One self-contained page from the JSON files of `eval`, `reproduce` and `bench generate`: plots, then their tables."""

from __future__ import annotations

import html
import json
import math
import shlex
from pathlib import Path

from .peers import PEERS
from .results import render
from .simulated import SIMULATED

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 74, 28, 46, 54
LONG_TABLE = 12  # rows; longer ones are folded
FEWEST_POINTS = 8  # of a drawing of bits against loss
MEBIBYTE = 1 << 20
KINDS = {"halfbyte": "a", "halfbyte, simulated": "b", "others, simulated": "c"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #c9ced6; --faint: #6a737d;
  --a: #0b63c5; --b: #1a8a4a; --c: #b4530a; --heat: 11, 99, 197; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171a; --line: #3a4048; --faint: #9aa3ad;
  --a: #6cb2ff; --b: #5fd08f; --c: #f2a65a; --heat: 108, 178, 255; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 760px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
svg { width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg .small { font-size: 10px; } svg .faint { fill: var(--faint); }
.a { fill: var(--a); stroke: var(--a); color: var(--a); }
.b { fill: var(--b); stroke: var(--b); color: var(--b); }
.c { fill: var(--c); stroke: var(--c); color: var(--c); }
svg path.a, svg path.b, svg path.c { fill: none; stroke-width: 2; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.15rem 0.5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.bars p { margin: 0.25rem 0; font-size: 0.8rem; line-height: 1.3; } .bars p.faint { color: var(--faint); }
.bars i { display: inline-block; height: 0.75em; margin-right: 0.5em; background: var(--a); }
summary { color: var(--faint); cursor: pointer; }
.legend span { margin-right: 1.2rem; display: inline-block; }
.legend b { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em;
  border-radius: 50%; background: currentColor; }
@media (max-width: 600px) { svg text { font-size: 19px; } svg .small { display: none; } }
footer { color: var(--faint); font-size: 0.8rem; margin-top: 3rem; overflow-wrap: anywhere; }
"""


class _Scale:
    """Values to pixels along one axis, linear or logarithmic, with a few round marks or those given."""

    def __init__(self, values, start, end, log=False, marks=None):
        self.log, self.start, self.end, self.given = log, start, end, marks
        low, high = min(values), max(values)
        if log and marks:
            self.low, self.high = math.log10(low) - 0.05, math.log10(high) + 0.05
        elif log:
            self.low, self.high = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
        else:
            room = (high - low or 1) * 0.06
            self.low, self.high = low - room, high + room

    def __call__(self, value):
        position = math.log10(value) if self.log else value
        return self.start + (position - self.low) / (self.high - self.low or 1) * (self.end - self.start)

    def marks(self):
        if self.given:
            return self.given
        if self.log:
            return [10.0**power for power in range(self.low, self.high + 1)]
        step = 10 ** math.floor(math.log10(self.high - self.low))
        step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if (self.high - self.low) / (step * part) <= 8)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def _svg(parts, label, height=HEIGHT) -> str:
    label = html.escape(label)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = [f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}"/>']
    for mark in x.marks():
        parts.append(f'<text x="{x(mark):.1f}" y="{floor + 20}" text-anchor="middle">{mark:g}</text>')
    for mark in y.marks():
        parts.append(f'<path class="axis" stroke-dasharray="2 4" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    parts.append(
        f'<text class="faint" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    parts.append(f'<text class="faint" x="4" y="19">{html.escape(y_label)}</text>')
    return parts


def kind_of(recipe: str) -> str:
    """Whose a row of `eval` is."""
    if recipe.removesuffix("-sinks") in PEERS:
        return "others, simulated"
    return "halfbyte, simulated" if recipe in SIMULATED else "halfbyte"


def frontier(rows: list[dict]) -> list[dict]:
    """The rows that no other one beats at as few bits, by bits."""
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda row: (row["bits"], row["kl"])):
        if row["kl"] < best:
            best = row["kl"]
            kept.append(row)
    return kept


class Labels:
    """Finds places for names beside points, y downwards, where neither another name nor a point is in the way."""

    def __init__(self, points, left, right, letter=5.6, line=10):
        self.taken = [(x - 4, x + 4, y - 4, y + 4) for x, y in points]
        self.left, self.right, self.letter, self.line = left, right, letter, line

    def find(self, name, x, y):
        """(left end, base line) of the name, or None where there is no room for it."""
        wide = self.letter * len(name)
        right, before, line = x + 7, x - 7 - wide, self.line
        for left, base in [(right, y + 4), (before, y + 4)] + [
            (side, y + shift) for shift in (-7, line + 4) for side in (right - 2, before + 2)
        ]:
            box = (left, left + wide, base - line + 2, base + 2)
            free = not any(
                box[0] < end and box[1] > start and box[2] < below and box[3] > above
                for start, end, above, below in self.taken
            )
            if free and left > self.left and box[1] < self.right:
                self.taken.append(box)
                return left, base
        return None


def pareto(rows: list[dict]) -> str:
    """Bits a value against KL, logarithmic; the line joins what nothing beats."""
    rows = sorted((row for row in rows if row["kl"] > 0), key=lambda row: row["kl"])
    x = _Scale([row["bits"] for row in rows], LEFT, WIDTH - RIGHT)
    y = _Scale([row["kl"] for row in rows], HEIGHT - BOTTOM, TOP, log=True)
    parts = _axes(x, y, "bits a value, scales included", "KL to the full cache, nats a token")
    best = frontier(rows)
    points = " L".join(f"{x(row['bits']):.1f} {y(row['kl']):.1f}" for row in best)
    parts.append(f'<path class="axis" fill="none" d="M{points}"/>')
    labels = Labels([(x(row["bits"]), y(row["kl"])) for row in rows], LEFT, WIDTH)
    names = []
    for row in [*best, *(row for row in rows if row not in best)]:
        at = f"{row['recipe']}: {row['bits']:.3g} bits, KL {row['kl']:.3g}"
        mark = KINDS[kind_of(row["recipe"])]
        place = f'cx="{x(row["bits"]):.1f}" cy="{y(row["kl"]):.1f}"'
        parts.append(f'<circle class="{mark}" {place} r="4"><title>{html.escape(at)}</title></circle>')
        place = labels.find(row["recipe"], x(row["bits"]), y(row["kl"]))
        if place:
            name = html.escape(row["recipe"])
            names.append(f'<text class="small" x="{place[0]:.1f}" y="{place[1]:.1f}">{name}</text>')
    legend = "".join(f'<span><b class="{mark}"></b>{kind}</span>' for kind, mark in KINDS.items())
    return f'<p class="legend">{legend}</p>' + _svg(parts + names, "Bits a value against KL")


def bars(rows: list[dict]) -> str:
    """One bar a line, as long as the logarithm of its KL; text around it, so that any width of page will do."""
    rows = [row for row in rows if row.get("kl")]
    length = _Scale([row["kl"] for row in rows], 0, 80, log=True)
    drawn = "".join(
        f"<p>{html.escape(row['line'].replace('`', ''))}<br>"
        f'<i style="width: {max(length(row["kl"]), 1):.1f}%"></i>{row["kl"]:.3g}</p>'
        for row in rows
    )
    return f'<div class="bars"><p class="faint">KL, on a logarithmic scale</p>{drawn}</div>'


def heat(rows: list[dict]) -> str:
    """KL of each layer's K and V packed alone: the stronger the colour, the larger the loss."""
    cells = {tuple(row["line"].split()[1:]): row["kl"] for row in rows}
    layers = sorted({int(layer) for layer, _ in cells})
    most = max(cells.values()) or 1.0
    size = min(80, (WIDTH - 80) / len(layers))
    parts = [f'<text class="faint" x="60" y="18">KL with one side of one layer packed; strongest: {most:.2g}</text>']
    for column, layer in enumerate(layers):
        x = 60 + column * size
        parts.append(f'<text x="{x + size / 2:.1f}" y="40" text-anchor="middle">{layer}</text>')
        for line, which in enumerate("KV"):
            value, y = cells.get((str(layer), which), 0.0), 44 + line * 40
            share = 0.08 + 0.92 * value / most
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size - 2:.1f}" height="38" '
                f'style="fill: rgba(var(--heat), {share:.2f})"><title>layer {layer} {which}: {value:.3g}</title></rect>'
            )
            if size > 50:
                ink = ' style="fill: var(--paper)"' if share > 0.5 else ""
                place = f'x="{x + size / 2 - 1:.1f}" y="{y + 24}" text-anchor="middle"'
                parts.append(f'<text class="small" {place}{ink}>{value:.2g}</text>')
    parts += [f'<text x="44" y="{68 + line * 40}" text-anchor="end">{which}</text>' for line, which in enumerate("KV")]
    return _svg(parts, "KL by layer and side", 130)


def lines(rows: list[dict], keys: dict[str, str], y_label: str, unit: float = 1.0) -> str:
    """Rows of `bench generate` against the prefix. keys: {row key: name}; unit: what the values are divided by."""
    rows = sorted(rows, key=lambda row: row["prefix"])
    prefixes = [row["prefix"] for row in rows]
    x = _Scale(prefixes, LEFT, WIDTH - RIGHT, log=True, marks=prefixes)
    y = _Scale([0.0, *(row[key] / unit for row in rows for key in keys)], HEIGHT - BOTTOM, TOP)
    parts = _axes(x, y, "prefix, tokens", y_label)
    for (key, name), mark in zip(keys.items(), ("c", "a"), strict=True):
        points = [(x(row["prefix"]), y(row[key] / unit)) for row in rows]
        parts.append(f'<path class="{mark}" d="M' + " L".join(f"{a:.1f} {b:.1f}" for a, b in points) + '"/>')
        parts += [f'<circle class="{mark}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
        parts.append(f'<text x="{points[-1][0] - 8:.1f}" y="{points[-1][1] - 8:.1f}" text-anchor="end">{name}</text>')
    return _svg(parts, y_label)


def table(rows: list[dict]) -> str:
    """Rows as they are; columns that are empty in all of them are left out."""
    keys = [
        k for k in rows[0] if not isinstance(rows[0][k], list | dict) and any(row[k] not in (None, "") for row in rows)
    ]
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(render(row[key]).replace('`', ''))}</td>" for key in keys) + "</tr>"
        for row in rows
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return whole if len(rows) <= LONG_TABLE else f"<details><summary>{len(rows)} rows</summary>{whole}</details>"


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


def option_of(document: dict, name: str, default: str) -> str:
    """What a command was told under an option; the default where it was not."""
    words = shlex.split(document["command"])
    return words[words.index(name) + 1] if name in words[:-1] else default


def model_of(document: dict) -> str:
    """What a command was told to measure."""
    return option_of(document, "--model", "tiny-qwen")


def evaluated_rows(documents: list[dict]) -> dict[tuple, list[dict]]:
    """{(model, how it was measured): rows} of the files of `eval`; those measured alike are joined, a recipe once."""
    found: dict[tuple, dict] = {}
    for document in documents:
        if "recipe" in document["rows"][0] and "kl" in document["rows"][0]:
            windows, window = option_of(document, "--windows", "8"), option_of(document, "--window", "2048")
            how = f"{windows} windows of {window}, {option_of(document, '--protocol', 'packed')}"
            rows = found.setdefault((model_of(document), how), {})
            rows.update({row["recipe"]: row for row in document["rows"]})
    return {key: list(rows.values()) for key, rows in found.items()}


def sections(documents: list[dict]):
    """(heading, HTML) in the order they are read."""
    for (model, how), rows in evaluated_rows(documents).items():
        plot = pareto(rows) if len(rows) >= FEWEST_POINTS else ""
        heading = f"Bits against loss, {model} ({how.replace('1 windows', 'one window')})"
        yield heading, plot + table(sorted(rows, key=lambda row: row["bits"]))
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
                        + lines(dtype_rows, held, "MiB of cache", MEBIBYTE)
                        + table(dtype_rows)
                    ),
                )
        for name in dict.fromkeys(row["table"] for row in rows if "table" in row):
            own = [row for row in rows if row["table"] == name]
            shown = [{key: value for key, value in row.items() if key != "table"} for row in own]
            plot = heat(own) if name == "layers" else "" if name == "memory" else bars(own)
            yield f"{name.capitalize()}, {model}", plot + table(shown)


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
