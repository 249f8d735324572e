#!/usr/bin/env python3
"""Makes one Metal text of src/gpu/kernels.metal and all that it includes, for programs that compile from a string.

usage: tools/flatten_metal.py OUTPUT
"""

import re
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src"
INCLUDE = re.compile(r'\s*#\s*include\s+"(.+)"')
HEADING = "// Made by tools/flatten_metal.py from src/gpu/kernels.metal: edit that.\n"


def branch_of_metal(lines: list[str]) -> list[str]:
    """The lines that are left when __METAL_VERSION__ is defined, of `#if defined(__METAL_VERSION__)` … `#endif`."""
    kept, state = [], []
    for line in lines:
        word = line.split()[0] if line.split() else ""
        if word in ("#if", "#ifdef", "#ifndef"):
            state.append({"#if defined(__METAL_VERSION__)": "metal"}.get(line.strip(), "any"))
            if state[-1] == "metal":
                continue
        elif word in ("#else", "#endif") and state[-1] != "any":
            state[-1] = "other"
            if word == "#endif":
                state.pop()
            continue
        elif word == "#endif":
            state.pop()
        if "other" not in state:
            kept.append(line)
    return kept


def flatten(path: Path, seen: set[Path]) -> list[str]:
    """The lines of `path`, each header in the place where it is included first."""
    out = []
    for line in branch_of_metal(path.read_text(encoding="utf-8").splitlines(keepends=True)):
        included = INCLUDE.match(line)
        if included:
            header = SOURCE / included[1]
            if header not in seen:
                seen.add(header)
                out += [f"\n// ---- src/{included[1]}\n", *flatten(header, seen)]
        elif line.strip() != "#pragma once" and not re.match(r"#include <std\w+\.h>", line):
            out.append(line)
    return out


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    text = HEADING + "".join(flatten(SOURCE / "gpu/kernels.metal", set()))
    Path(sys.argv[1]).write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
