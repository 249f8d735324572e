#!/usr/bin/env python3
"""Compares the instructions each kernel executes with tests/counts.json: what a busy machine cannot disturb.

usage: tools/check_counts.py PROGRAM COMPILER [--update]

PROGRAM is halfbyte_counts (bench/counts.cpp). Fails on 2 % more instructions than recorded, and on 5 % fewer, which
wants --update so that the file stays true. Counts depend on the compiler: another one than recorded skips the check,
as does a machine without valgrind (exit status 77). Valgrind 3.19 knows no AVX-512, so that backend is not counted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

EXPECTED = Path(__file__).resolve().parents[1] / "tests" / "counts.json"
BACKENDS = ("scalar", "avx2")
MORE, FEWER = 0.02, 0.05  # shares of the recorded count
SKIPPED = 77  # what CTest takes for a skip


def count(program: str, backends=BACKENDS) -> dict[str, int]:
    """{case: instructions} of each case the program runs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        run = subprocess.run(
            ["valgrind", "--tool=callgrind", "--zero-before=counted_part", "--dump-after=counted_part",
             f"--callgrind-out-file={out}", program, *backends],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            raise SystemExit(f"{program} under valgrind failed:\n{run.stdout}{run.stderr}")
        names = run.stdout.splitlines()
        return {name: total(Path(f"{out}.{i}").read_text()) for i, name in enumerate(names, 1)}


def total(dump: str) -> int:
    """Instructions of one callgrind dump."""
    return int(re.search(r"^totals: (\d+)$", dump, re.MULTILINE)[1])


def compiler_of(command: str) -> str:
    """The first line a compiler says of its version, without the name it was called by: "(Debian 12.2.0-14) 12.2.0"."""
    line = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return re.sub(r"^(c\+\+|g\+\+)\S*", "g++", line)


def compare(expected: dict[str, int], measured: dict[str, int]) -> list[str]:
    """One line for each case that differs more than it may; empty when all is well."""
    complaints = [f"{name}: not counted any more; --update" for name in expected.keys() - measured.keys()]
    for name, instructions in measured.items():
        if name not in expected:
            complaints.append(f"{name}: not in {EXPECTED.name}; --update")
            continue
        before = expected[name]
        line = f"{name}: {instructions:,} instructions, {instructions / before - 1:+.1%} against {before:,}"
        if instructions > before * (1 + MORE):
            complaints.append(line)
        elif instructions < before * (1 - FEWER):
            complaints.append(line + ": better; --update")
    return sorted(complaints)


def skip(reason: str):
    print(f"instruction counts not checked: {reason}")
    sys.exit(SKIPPED)


def main(program: str, compiler_command: str, update: bool) -> None:
    compiler = compiler_of(compiler_command)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {"compiler": None}
    try:
        valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    except OSError:
        skip("valgrind is not installed")
    if not update and compiler != expected["compiler"]:
        skip(f"{EXPECTED.name} is for {expected['compiler']}, and this is {compiler}")
    measured = count(program)
    if update:
        document = {"compiler": compiler, "valgrind": valgrind, "instructions": measured}
        EXPECTED.write_text(json.dumps(document, indent=1) + "\n")
    for name, instructions in measured.items():
        print(f"{instructions:>12,}  {name}")
    complaints = [] if update else compare(expected["instructions"], measured)
    if complaints:
        sys.exit("\n".join(["", *complaints, "make counts-update records these counts."]))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--update"]
    if len(words) != 2:
        sys.exit(__doc__)
    main(*words, update="--update" in sys.argv)
