"""Writes the tables of docs/results/cpu.md from the files that tools/measure_cpu.sh leaves.

usage: tools/results_page.py [FOLDER]    (default docs/results/cpu; the page is the FOLDER's name with .md)

Only what stands between the two marks of the page is replaced. Targets and "met" are computed here, from the rows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- measured: written by tools/results_page.py -->\n", "<!-- end of measured -->\n"


@dataclass
class Claim:
    """A number of the rows of one file that has a target. where: what those rows have."""

    what: str
    file: str
    where: dict
    key: str
    target: float
    at_most: bool = False

    def rows(self, documents: dict) -> list[dict]:
        rows = documents.get(self.file, {"rows": []})["rows"]
        return [row for row in rows if all(row[key] == value for key, value in self.where.items())]

    def met(self, value: float) -> bool:
        return value <= self.target if self.at_most else value >= self.target


def against_fp16(geometry: str, tokens: int, target: float, file="attend") -> Claim:
    what = f"{geometry}{', AVX2' if file != 'attend' else ''}, {tokens} tokens: our fp16 / int4"
    return Claim(what, file, {"geometry": geometry, "tokens": tokens}, "fp16_over_int4", target)


CLAIMS = [
    *(against_fp16("qwen", tokens, target) for tokens, target in ((4096, 2.5), (32768, 2.8))),
    *(against_fp16("gemma", tokens, target) for tokens, target in ((4096, 2.2), (32768, 2.5))),
    *(against_fp16("smollm2", tokens, 2.0) for tokens in (4096, 32768)),
    *(against_fp16("qwen", tokens, 1.5, "attend-avx2") for tokens in (4096, 32768)),
    *(
        Claim(f"qwen, {tokens} tokens: sdpa bf16 as transformers calls it / int4", "attend",
              {"geometry": "qwen", "tokens": tokens}, "sdpa_over_int4", 8.0)
        for tokens in (4096, 32768)
    ),
    Claim("qwen, 32768 tokens: share of read bandwidth", "attend", {"geometry": "qwen", "tokens": 32768, "threads": 2},
          "read_bandwidth_share", 0.6),
    Claim("encode d 128, SRFT g32, no search: ns a vector", "encode", {"recipe": "no-search", "head_dim": 128},
          "ns_per_vector", 60.0, at_most=True),
    *(
        Claim(f"{queries} queries on a packed prefix of {prefix}: unpack and sdpa / int4", f"queries-{prefix}",
              {"queries": queries, "prefix": prefix}, "unpack_over_int4", 1.0)
        for prefix in (1024, 8192, 32768)
        for queries in (4, 16, 64, 512)
    ),
    *(
        Claim(f"generate tiny-{model}, prefix {prefix}: int4 / the best DynamicCache", f"generate-{model}",
              {"prefix": prefix}, "int4_over_fp", 0.6 if prefix == 16384 else 1.0, at_most=True)
        for model in ("qwen", "gemma")
        for prefix in (256, 1024, 4096, 16384)
    ),
    *(
        Claim(f"tiny-{model}, prefix 4096: cache bytes, bf16 / int4", f"generate-{model}", {"prefix": 4096},
              "bytes_ratio", 3.4)
        for model in ("qwen", "gemma")
    ),
]  # fmt: skip


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def cell(row: dict, key: str) -> str:
    """A value, with its quartiles where the row has them."""
    value = row.get(key, "")
    if not isinstance(value, float):
        return str(value)
    spread = row.get(f"{key}_spread")
    return number(value) + (f" ({number(spread[0])}–{number(spread[1])})" if spread else "")


def table(headings: list[str], lines: list[list[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in rows) + "\n"


def claims_table(documents: dict) -> str:
    lines = []
    for claim in CLAIMS:
        for row in claim.rows(documents):
            threads = str(row.get("threads", ""))
            target = ("≤ " if claim.at_most else "≥ ") + number(claim.target)
            met = "met" if claim.met(row[claim.key]) else "**not met**"
            lines.append([claim.what, threads, cell(row, claim.key), target, met])
    return table(["what", "threads", "measured (quartiles)", "target", ""], lines)


# Every file's rows, as they are: {name of the file begins with: columns}.
COLUMNS = {
    "attend": ["geometry", "backend", "recipe", "tokens", "threads", "fp16_ns", "int4_ns", "sdpa_ns", "sdpa_folded_ns",
               "fp16_over_int4", "sdpa_over_int4", "sdpa_folded_over_int4", "read_bandwidth_share"],
    "queries": ["geometry", "prefix", "queries", "threads", "int4_ms", "unpack_ms", "unpack", "unpack_over_int4"],
    "encode": ["backend", "head_dim", "recipe", "ns_per_vector", "over_no_search"],
    "generate": ["model", "dtype", "prefix", "fp_ms_per_token", "int4_ms_per_token", "int4_over_fp", "bytes_ratio"],
    "roofline": ["geometry", "tokens", "threads", "kernel", "ns", "floor_ns", "share", "bound", "operations_per_byte",
                 "gops", "set_gb_per_s"],
}  # fmt: skip


def rows_section(name: str, document: dict) -> str:
    columns = next(columns for prefix, columns in COLUMNS.items() if name.startswith(prefix))
    rows = document["roofline"] if name == "roofline" else document["rows"]
    lines = [[cell(row, key) for key in columns] for row in rows]
    return f"### {name}\n\n`{document['command']}`\n\n" + table([key.replace("_", " ") for key in columns], lines)


def machine_section(documents: dict) -> str:
    first = next(iter(documents.values()))["machine"]
    commits = sorted({document["commit"] for document in documents.values()})
    loads = [document["machine"]["load_average"] for document in documents.values()]

    def range_of(roof):
        parts = []
        for n in first[roof]:
            values = [document["machine"][roof][n] for document in documents.values()]
            parts.append(f"{number(min(values))}–{number(max(values))} on {n}")
        return ", ".join(parts)

    return (
        f"Machine: {first['cpu']}, {first['cores']} cores, {first['memory_bytes'] / 2**30:.0f} GiB, backend "
        f"{first['backend']}, torch {first['torch']}, transformers {first['transformers']}, Python {first['python']}; "
        f"load average {min(loads)}–{max(loads)}. Commit {', '.join(commits)}.\n\n"
        f"Roofs, each measured beside every file (threads): read bandwidth {range_of('read_gb_per_s')} GB/s; int8 dot "
        f"products {range_of('dot_gops')} Gop/s; fp32 fma {range_of('fma_gflops')} GFLOP/s.\n\n"
    )


def with_bytes_ratio(row: dict) -> dict:
    if "fp_cache_bytes" not in row:
        return row
    return row | {"bytes_ratio": row["fp_cache_bytes"] / row["int4_cache_bytes"]}


def render(documents: dict, folder_name: str, pictures: list[str]) -> str:
    """Markdown of all measured things. documents: {file's stem: content}."""
    text = machine_section(documents) + "## Against the targets\n\n" + claims_table(documents)
    text += "".join(f"![{name}]({folder_name}/{name}.png)\n\n" for name in pictures)
    return text + "## All rows\n\n" + "".join(rows_section(name, document) for name, document in documents.items())


def main(folder: Path) -> None:
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not documents:
        sys.exit(f"{folder} holds no JSON files: run tools/measure_cpu.sh first")
    for document in documents.values():
        document["rows"] = [with_bytes_ratio(row) for row in document["rows"]]
    pictures = [path.stem for path in sorted(folder.glob("*.png"))]
    page = folder.with_suffix(".md")
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(before + BEGIN + "\n" + render(documents, folder.name, pictures) + END + after)
    print(f"wrote {page}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/cpu"))
