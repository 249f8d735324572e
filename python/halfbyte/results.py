"""Writes what a command measured: tables for people, JSON with the machine and commit for everything else."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

BANDWIDTH_BYTES = 256 << 20  # larger than the last-level caches in use, so that memory itself is read


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Physical memory in bytes, 0 when the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(package: str) -> str | None:
    """A package's installed version without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load_average() -> float:
    """Processes that wanted a core over the last minute, 0 where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def warn_if_busy() -> None:
    """Says on stderr, before anything is timed, that other work on the machine will show in the times."""
    load, cores = load_average(), usable_cores()
    if load > cores / 2:
        print(f"halfbyte: other work keeps this machine busy (load {load} on {cores} cores): times will show it",
              file=sys.stderr)  # fmt: skip


def machine_facts() -> dict:
    """What a number depends on: processor, cores, memory, system, versions, and the roofs of one core and of all."""
    from . import _native

    cores = usable_cores()
    facts = {
        "cpu": cpu_model(),
        "cores": cores,
        "memory_bytes": memory_bytes(),
        "load_average": load_average(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "backend": _native.backend(),
        "cpu_features": list(_native.cpu_features()),
        "read_gb_per_s": {str(n): round(_native.read_bandwidth(BANDWIDTH_BYTES, n, 3), 2) for n in sorted({1, cores})},
        "dot_gops": {str(n): round(_native.dot_peak(n), 1) for n in sorted({1, cores})},
        "fma_gflops": {str(n): round(_native.fma_peak(n), 1) for n in sorted({1, cores})},
    }
    return facts | {name: version_of(name) for name in ("torch", "transformers")}


def git_commit() -> str:
    """The commit of the checkout the package lies in, "+" when it has changes; else the one it was built from."""
    from . import _native

    folder = Path(__file__).resolve().parents[2]
    if (folder / ".git").exists():
        try:

            def git(*words):
                return subprocess.run(
                    ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
                ).stdout.strip()

            return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
        except (OSError, subprocess.SubprocessError):
            pass
    return _native.commit


def command_line() -> str:
    """The command as typed, with the program's folder left off."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def check_writable(path: Path | None, argument: str) -> None:
    """ValueError before a long run, rather than after it, when the file it ends with could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{argument}: {str(path)!r} is a folder; takes a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{argument}: the folder {str(path.absolute().parent)!r} does not exist")


def write_json(path, rows: list[dict], command: str, **more) -> None:
    """Writes {"halfbyte", "commit", "machine", "command", ..., "rows"}; whole or not at all. more: e.g. seeds."""
    from . import _native

    document = {"halfbyte": _native.version, "commit": git_commit(), "machine": machine_facts(), "command": command}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document | more | {"rows": rows}, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


# Column headings that a narrow terminal can break at spaces; other keys stand as they are.
HEADINGS = {
    "fp_ms_per_token": "fp ms/ token",
    "int4_ms_per_token": "int4 ms/ token",
    "fp_cache_bytes": "fp cache bytes",
    "int4_cache_bytes": "int4 cache bytes",
    "ppl_fp": "ppl fp",
    "ppl_int4": "ppl int4",
    "delta_ppl": "delta ppl",
    "read_bandwidth_share": "share of read bandwidth",
    "ns_per_vector": "ns per vector",
    "over_no_search": "over no-search",
    "int4_over_fp": "time ratio",
    "fp16_over_int4": "fp16/ int4",
    "sdpa_over_int4": "sdpa/ int4",
    "sdpa_folded_over_int4": "sdpa folded/ int4",
    "sdpa_folded_ns": "sdpa folded ns",
    "unpack_over_int4": "unpack/ int4",
    "operations_per_byte": "operations per byte",
}


def render(value) -> str:
    """A cell: as many digits as mean something."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        if value == 0:
            return "0"
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def cells(row: dict) -> dict[str, str]:
    """{heading: cell}. A "…_spread" [lower, upper] joins its value; other lists and dicts are for the file alone."""
    shown = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    out = {}
    for key, value in shown.items():
        spread = row.get(f"{key}_spread")
        text = render(value) if spread is None else f"{render(value)} ({render(spread[0])}–{render(spread[1])})"
        out[HEADINGS.get(key, key)] = text
    return out


def print_table(title: str, rows: list[dict], caption: str | None = None) -> None:
    """Prints rows (dicts with the same keys) as one table on stdout; see cells for what is left out."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    words = {HEADINGS.get(key, key) for key, value in rows[0].items() if isinstance(value, str)}
    for heading in cells(rows[0]):
        table.add_column(heading, justify="left" if heading in words else "right")
    for row in rows:
        table.add_row(*cells(row).values())
    # A pipe has no width of its own: keep lines whole there instead of folding them to 80.
    console = Console()
    console = console if console.is_terminal else Console(width=220)
    for part in (f"\n{title}", table, caption):
        if part is not None:
            console.print(part, highlight=False, markup=False)
