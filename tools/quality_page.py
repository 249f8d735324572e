"""Writes the tables of docs/results/quality.md from the files in docs/results/quality that halfbyte --json left there.

usage: tools/quality_page.py

Only what stands between the two marks of the page is replaced; every number comes from a file.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs/results/quality"
BEGIN, END = "<!-- measured: written by tools/quality_page.py -->\n", "<!-- end of measured -->\n"
COLUMNS = {
    "bits": "bits",
    "delta_ppl": "ΔPPL",
    "kl": "KL",
    "kl_sd": "± sd",
    "kl_p99": "KL, 99th percentile",
    "top1": "top-1",
    "greedy_tokens": "greedy tokens",
    "needle_agree": "needle agreement",
    "error_cut": "loss cut",
    "bytes_ratio": "bytes, bf16 / int4",
    "paper": "the paper",
    "paper_model": "on",
}


def shown(key: str, value) -> str:
    """A cell."""
    if value in (None, ""):
        return ""
    if key == "delta_ppl":
        return f"{value:+.2f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: list[dict], first: str) -> list[str]:
    """Markdown of the columns that some row fills."""
    keys = [key for key in COLUMNS if any(row.get(key) not in (None, "") for row in rows)]
    lines = [f"| {first} | " + " | ".join(COLUMNS[key] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row[first]} | " + " | ".join(shown(key, row.get(key)) for key in keys) + " |")
    return [*lines, ""]


def positions(rows: list[dict]) -> list[str]:
    """Markdown of the KL in eighths of a long window."""
    lines = ["| recipe | KL in each eighth of the window, first to last | all |", "|---|---|---|"]
    for row in rows:
        parts = " ".join(f"{part:.4f}" for part in row["kl_by_position"])
        lines.append(f"| {row['recipe']} | {parts} | {row['kl']:.4f} |")
    return [*lines, ""]


def page() -> list[str]:
    """All sections."""
    lines = []
    for path in sorted(FOLDER.glob("*.json")):
        document = json.loads(path.read_text())
        rows = document["rows"]
        lines += [f"## {path.stem.replace('-', ' ', 1)}", ""]
        lines += [f"`{document['command']}` (commit {document['commit']}; {document['machine']['cpu']})", ""]
        if path.stem.startswith("long"):
            lines += positions(rows)
        elif "table" in rows[0]:
            for name in dict.fromkeys(row["table"] for row in rows):
                lines += [f"### {name}", "", *table([row for row in rows if row["table"] == name], "line")]
        else:
            lines += table(sorted(rows, key=lambda row: (row["bits"], row["kl"])), "recipe")
    return lines


if __name__ == "__main__":
    target = FOLDER.with_suffix(".md")
    text = target.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    target.write_text(before + BEGIN + "\n" + "\n".join(page()) + END + after)
