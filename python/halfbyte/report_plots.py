"""The drawings of the report as PNG files, for pages that can not hold SVG: each from the JSON files with its rows."""

from __future__ import annotations

from pathlib import Path

from .plots import COLORS, FAINT, INK, figure, load_matplotlib, save, thousands
from .report import (
    FEWEST_POINTS,
    KINDS,
    MEBIBYTE,
    Labels,
    evaluated_rows,
    frontier,
    kind_of,
    model_of,
    read_documents,
)

KIND_COLORS = dict(zip(KINDS, (COLORS["int4"], "#1a8a4a", COLORS["fp16"]), strict=True))
DPI = 110  # a page shows them at about half their width
BITS = 3.9, 5.1  # of the codecs that are drawn against each other: those of about four


def write_plots(paths, folder) -> list[str]:
    """Draws what the files hold into `folder`; returns the names, some of pareto, ladder, layers, time and memory .png.

    The folder is made if need be. ValueError when the files hold nothing that is drawn.
    """
    load_matplotlib()
    documents = read_documents(paths)
    written = []
    for name, draw, panels in (
        ("pareto.png", _draw_pareto, _losses(documents)),
        ("ladder.png", _draw_ladder, _tables(documents, "ladder")),
        ("layers.png", _draw_layers, _tables(documents, "layers")),
        ("time.png", _draw_time, _contexts(documents)),
        ("memory.png", _draw_memory, _contexts(documents)),
    ):
        if panels:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save(draw(panels), Path(folder) / name, DPI)
            written.append(name)
    if not written:
        raise ValueError("json: none of the files is of `eval`, `reproduce` or `bench generate`")
    return written


# ---- {title of a panel: its rows}


def _losses(documents):
    found = evaluated_rows(documents)
    return {f"{model}: {how}": rows for (model, how), rows in found.items() if len(rows) >= FEWEST_POINTS}


def _tables(documents, table):
    found = {}
    for document in documents:
        own = [row for row in document["rows"] if row.get("table") == table]
        if own:
            found[model_of(document)] = own
    return found


def _contexts(documents):
    rows = [row for document in documents for row in document["rows"] if "fp_ms_per_token" in row]
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: sorted((r for r in rows if r["model"] == model), key=lambda r: r["prefix"]) for model in models}


# ---- drawings, a panel for each title


def _draw_pareto(panels):
    drawn, axes = figure(6.4 * len(panels), 5.2, ncols=len(panels), squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        rows = sorted((row for row in rows if BITS[0] < row["bits"] < BITS[1]), key=lambda row: row["kl"])
        best = frontier(rows)
        axis.plot([row["bits"] for row in best], [row["kl"] for row in best], color=FAINT, linewidth=1)
        for kind, color in KIND_COLORS.items():
            own = [row for row in rows if kind_of(row["recipe"]) == kind]
            axis.scatter([row["bits"] for row in own], [row["kl"] for row in own], color=color, label=kind, zorder=3)
        axis.set(title=title, xlabel="bits a value, scales included", yscale="log", xlim=BITS)
    axes[0][0].set_ylabel("KL to the full cache, nats a token")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(0.0, 0.8))
    drawn.canvas.draw()  # names go where there is room, which is known once everything has its place
    for axis, rows in zip(axes[0], panels.values(), strict=True):
        _name_points(axis, [row for row in rows if BITS[0] < row["bits"] < BITS[1]])
    return drawn


def _name_points(axis, rows):
    rows = frontier(rows) + sorted(rows, key=lambda row: (kind_of(row["recipe"]) != "halfbyte", row["kl"]))
    rows = list({row["recipe"]: row for row in rows}.values())
    at = {row["recipe"]: axis.transData.transform((row["bits"], row["kl"])) for row in rows}
    box = axis.get_window_extent()
    labels = Labels([(x, -y) for x, y in at.values()], box.x0, box.x1, letter=6.4, line=11)
    for name, (x, y) in at.items():
        place = labels.find(name, x, -y)
        if place:
            left, base = axis.transData.inverted().transform((place[0], -place[1]))
            axis.text(left, base, name, fontsize=8)


def _draw_ladder(panels):
    drawn, axes = figure(6.4 * len(panels), 3.6, ncols=len(panels), sharey=True, squeeze=False)
    for axis, (model, rows) in zip(axes[0], panels.items(), strict=True):
        names = [row["line"].replace("`", "") for row in rows]
        axis.barh(names, [row["kl"] for row in rows], color=COLORS["int4"])
        for name, row in zip(names, rows, strict=True):
            axis.annotate(f"{row['kl']:.2g}", (row["kl"], name), xytext=(4, 0), textcoords="offset points", va="center",
                          fontsize=8)  # fmt: skip
        axis.set(title=model, xlabel="KL to the full cache, nats a token", xscale="log")
        axis.margins(x=0.15)
        axis.grid(visible=False, axis="y")
    axes[0][0].invert_yaxis()
    return drawn


def _draw_layers(panels):
    drawn, axes = figure(4.6 * len(panels), 2.6, ncols=len(panels), squeeze=False)
    for axis, (model, rows) in zip(axes[0], panels.items(), strict=True):
        cells = {tuple(row["line"].split()[1:]): row["kl"] for row in rows}
        count = 1 + max(int(layer) for layer, _ in cells)
        values = [[cells[str(layer), side] for layer in range(count)] for side in "KV"]
        axis.imshow(values, cmap="Blues", vmin=0, aspect="auto")
        half = max(max(line) for line in values) / 2
        for side, line in enumerate(values):
            for layer, value in enumerate(line):
                axis.text(layer, side, f"{value * 1e3:.2g}" if count < 9 else "", ha="center", va="center", fontsize=8,
                          color="white" if value > half else INK)  # fmt: skip
        axis.set_yticks([0, 1], ["K", "V"])
        axis.set_xticks(range(0, count, 1 if count < 9 else 5))
        axis.set(title=f"{model}: KL × 1000, one side of one layer packed", xlabel="layer")
        axis.grid(visible=False)
    return drawn


def _draw_contexts(panels, key, unit, label):
    drawn, axes = figure(5.2 * len(panels), 3.6, ncols=len(panels), squeeze=False)
    for axis, (model, rows) in zip(axes[0], panels.items(), strict=True):
        prefixes = [row["prefix"] for row in rows]
        for side, name, color in (("fp", "DynamicCache", COLORS["fp16"]), ("int4", "Int4Cache", COLORS["int4"])):
            axis.plot(prefixes, [row[f"{side}_{key}"] / unit for row in rows], marker="o", color=color, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(prefixes, [thousands(prefix) for prefix in prefixes])
        axis.set_ylim(0)
        axis.set(title=model, xlabel="prefix, tokens")
    axes[0][0].set_ylabel(label)
    axes[0][0].legend()
    return drawn


def _draw_time(panels):
    return _draw_contexts(panels, "ms_per_token", 1, "ms a token, the quicker of float32 and bfloat16")


def _draw_memory(panels):
    return _draw_contexts(panels, "cache_bytes", MEBIBYTE, "MiB of cache; DynamicCache in bfloat16")
