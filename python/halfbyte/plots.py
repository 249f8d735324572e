"""Draws what benches measured as PNG: the roofline of the attention kernels, and decoding time against the prefix."""

from __future__ import annotations

import math

PAPER, INK, FAINT = "#fbfaf6", "#24292f", "#8b949e"  # own background: the same on a light page and on a dark one
COLORS = {"int4": "#0b5cad", "fp16": "#c2570c"}
MARKERS = "osD^vP"
GOPS = "billion operations a second"


def load_matplotlib():
    """matplotlib.pyplot, drawing to files; ValueError when it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot: needs matplotlib, which is not installed: pip install 'halfbyte[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def figure(width: float, height: float, **options):
    """(figure, axes) in this project's colors."""
    pyplot = load_matplotlib()
    style = {"figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "text.color": INK}
    style |= {"axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    style |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    style |= {"grid.color": "#e4e2da", "grid.linewidth": 0.7, "legend.frameon": False, "axes.axisbelow": True}
    pyplot.rcParams.update(style)
    return pyplot.subplots(figsize=(width, height), layout="constrained", **options)


def save(drawn, file, dpi=150) -> None:
    drawn.savefig(file, dpi=dpi, format="png")
    load_matplotlib().close(drawn)


def thousands(tokens: int) -> str:
    """16384 as 16K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def plot_roofline(rows: list[dict], machine: dict, file) -> None:
    """rows: roofline_rows of one backend, recipe and number of threads; machine: the roofs that bench.roofs gives."""
    names = list(dict.fromkeys(row["geometry"] for row in rows))
    drawn, (roof, bars) = figure(13, 6.2, ncols=2, width_ratios=[1.25, 1])
    _draw_roofs(roof, rows, machine)
    _draw_points(roof, rows, names)
    _draw_shares(bars, rows, names)
    first = rows[0]
    threads = f"{first['threads']} thread" + "s" * (first["threads"] > 1)
    drawn.suptitle(
        f"Attention of one new token against the machine's roofs: {first['backend']}, {threads}", weight="bold"
    )
    save(drawn, file)


def _draw_roofs(axes, rows, machine):
    x = [row["operations_per_byte"] for row in rows]
    low, high = min(x) / 1.8, max(x) * 2.6
    peaks = [
        (machine["dot_gops"], "int8 dot peak", COLORS["int4"]),
        (machine["fma_gflops"], "fp32 fma peak", COLORS["fp16"]),
    ]
    top = max(machine["dot_gops"], machine["fma_gflops"])
    largest = max(row["set_gb_per_s"] for row in rows)
    for bandwidth, name, style in (
        (machine["read_gb_per_s"], "memory", "-"),
        (largest, "caches", (0, (4, 3))),
    ):
        end = min(high, top / bandwidth)
        axes.plot([low, end], [low * bandwidth, end * bandwidth], color=INK, linestyle=style, linewidth=1.4)
        angle = math.degrees(math.atan(bandwidth))
        axes.text(low * 1.1, low * 1.24 * bandwidth, f"{name}: {bandwidth:.0f} GB/s", fontsize=9, rotation=angle,
                  rotation_mode="anchor", transform_rotates_text=True)  # fmt: skip
    for peak, name, color in peaks:
        axes.plot([low, high], [peak, peak], color=color, linewidth=1.4)
        axes.annotate(f"{name}: {peak:.0f}", (high, peak), xytext=(0, 4), textcoords="offset points", ha="right",
                      color=color, fontsize=9)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations per byte of K and V read", ylabel=GOPS)
    axes.set_ylim(min(row["gops"] for row in rows) / 2.2, top * 1.8)
    bottom, top = axes.get_ylim()
    x_ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64) if low <= tick <= high]
    y_ticks = [tick * 10**power for power in range(6) for tick in (1, 2, 5) if bottom <= tick * 10**power <= top]
    axes.set_xticks(x_ticks, [str(tick) for tick in x_ticks])
    axes.set_yticks(y_ticks, [str(tick) for tick in y_ticks])
    axes.minorticks_off()


def _draw_points(axes, rows, names):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lengths = sorted({row["tokens"] for row in rows})
    for kernel, color in COLORS.items():
        for i, name in enumerate(names):
            mine = [row for row in rows if row["kernel"] == kernel and row["geometry"] == name]
            shift = 1.035 ** (i - (len(names) - 1) / 2)  # geometries of one group size would hide each other
            x, y = [row["operations_per_byte"] * shift for row in mine], [row["gops"] for row in mine]
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.6)
            sizes = [30 + 45 * lengths.index(row["tokens"]) for row in mine]
            axes.scatter(x, y, s=sizes, marker=MARKERS[i % len(MARKERS)], color=color, edgecolor=PAPER, zorder=3)
    keys = [Line2D([], [], linestyle="", marker=MARKERS[i % len(MARKERS)], color=INK, label=name)
            for i, name in enumerate(names)]  # fmt: skip
    keys += [Patch(color=color, label=f"{kernel} kernel") for kernel, color in COLORS.items()]
    sizes = " < ".join(thousands(tokens) for tokens in lengths)
    axes.legend(handles=keys, loc="lower right", ncols=2, title=f"size: tokens, {sizes}" if len(lengths) > 1 else None)


def _draw_shares(axes, rows, names):
    """One bar a kernel, geometry and number of tokens: floor over time."""
    y, labels = 0.0, []
    for name in names:
        for tokens in sorted({row["tokens"] for row in rows if row["geometry"] == name}):
            mine = [row for row in rows if row["geometry"] == name and row["tokens"] == tokens]
            for row in sorted(mine, key=lambda row: list(COLORS).index(row["kernel"])):
                axes.barh(y, row["share"] * 100, height=0.9, color=COLORS[row["kernel"]])
                axes.annotate(f"{row['share']:.0%}  {row['ns']:.1f} ns", (row["share"] * 100, y), xytext=(4, 0),
                              textcoords="offset points", va="center", fontsize=8)  # fmt: skip
                y += 1
            labels.append((y - 1.5, f"{name} {thousands(tokens)}"))
            y += 0.6
        y += 0.6
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels])
    axes.invert_yaxis()
    axes.set_xlim(0, max(100, max(row["share"] for row in rows) * 100) * 1.18)
    axes.axvline(100, color=INK, linewidth=1.2)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("% of the roof reached; ns per token per KV head")


def plot_generate(rows: list[dict], file) -> None:
    """rows: those of bench generate."""
    drawn, axes = figure(7.5, 4.8)
    x = [row["prefix"] for row in rows]
    for key, name, color in (
        ("fp_ms_per_token", "DynamicCache, the quicker of fp32 and bf16", COLORS["fp16"]),
        ("int4_ms_per_token", "Int4Cache", COLORS["int4"]),
    ):
        axes.plot(x, [row[key] for row in rows], marker="o", color=color, label=name)
    for row in rows:
        axes.annotate(f"{row['int4_over_fp']:.2f}×", (row["prefix"], row["int4_ms_per_token"]), xytext=(0, -15),
                      textcoords="offset points", ha="center", fontsize=8, color=COLORS["int4"])  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [thousands(prefix) for prefix in x])
    axes.set_ylim(0, max(row[key] for row in rows for key in ("fp_ms_per_token", "int4_ms_per_token")) * 1.15)
    axes.set(xlabel="prefix, tokens", ylabel="ms a token")
    axes.set_title(f"Decoding {rows[0]['model']}: time a token", weight="bold")
    axes.legend(loc="upper left")
    save(drawn, file)
