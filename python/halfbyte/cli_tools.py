"""What all commands share: their common options, checks, error lines and reports."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[str, typer.Option("--model", help="A folder, a hub id, tiny-qwen, tiny-gemma or smollm2.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write rows, machine and commit to this file.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Also draw it to this PNG file (needs matplotlib).")]
Seed = Annotated[int, typer.Option(help="Of everything random here.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: what the model computes in.")]


def reports_errors(command):
    """Bad input becomes one line on stderr and exit status 2; HALFBYTE_TRACEBACK=1 shows where it came from."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, NotImplementedError, ImportError, OSError) as error:
            if os.environ.get("HALFBYTE_TRACEBACK"):
                raise
            text = str(error)
            if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "transformers", "tqdm"):
                text = f"{error.name} is not installed: pip install 'halfbyte[hf]'"
            print("halfbyte: " + " ".join(text.split()), file=sys.stderr)
            raise typer.Exit(2) from error

    return run


def whole_numbers(text: str, option: str, least: int = 1) -> list[int]:
    """ "256,1024" as [256, 1024]; ValueError naming the option."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: got {text!r}; takes whole numbers with commas between, such as 256,1024") from None
    if min(numbers) < least:
        raise ValueError(f"{option}: got {min(numbers)}; takes numbers of at least {least}")
    return numbers


def report(title, rows, json_file, seeds, caption=None, extra=None):
    """The table on stdout, the file if asked for. extra: ratio columns, {name: row -> value}, for the table alone."""
    from .results import command_line, print_table, write_json

    shown = [row | {name: ratio(row) for name, ratio in (extra or {}).items()} for row in rows]
    print_table(title, shown, caption)
    if json_file is not None:
        write_json(json_file, rows, command_line(), seeds=seeds)


def begin(file, argument="json", timed=False, plot=None) -> None:
    """What every command checks before it starts."""
    from .results import check_writable, warn_if_busy

    check_writable(file, argument)
    if plot is not None:
        from .plots import load_matplotlib

        check_writable(plot, "plot")
        load_matplotlib()
    if timed:
        warn_if_busy()


BYTES_RATIO = {"bytes ratio": lambda r: r["fp_cache_bytes"] / r["int4_cache_bytes"]}
