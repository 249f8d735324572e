"""Writes the tables of docs/compatibility.md from the collected ids of tests/python/test_architectures.py."""

import argparse
import ast
import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = ROOT / "tests" / "python" / "test_architectures.py"
BEGIN = "<!-- tables: made by tools/write_compatibility.py, do not edit -->"
END = "<!-- end of tables -->"

GROUPS = {
    "Ways of decoding": (
        *("greedy", "sampling", "beam_search", "beam_sampling", "return_sequences"),
        *("assisted_decoding", "prompt_lookup", "guidance", "stopping_and_streaming"),
    ),
    "Prompts and batches": (
        *("left_padding", "right_padding", "chunked_prefill", "inputs_embeds", "conversation", "prefix_reuse"),
    ),
    "The cache's own operations": (
        "crop",
        "crop_of_everything",
        "reorder",
        "repeat_and_select",
        "reset",
        "save_and_load",
    ),
    "Packed and unpacked": ("layers", "unpacked", "eight_bits", "four_bits", "consistent"),
}
OTHERS = ("test_refused", "test_moved", "test_whisper", "test_beyond")


class Collector:
    """A pytest plugin that keeps the names of the tests collected."""

    def pytest_collection_finish(self, session):
        self.names = [item.name for item in session.items]


def collected() -> list[str]:
    """Names of the tests, such as test_greedy[llama], in the order of the file."""
    import pytest

    collector, output = Collector(), io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", str(TESTS)], plugins=[collector])
    if status:
        raise SystemExit(output.getvalue())
    return collector.names


def legend() -> dict[str, str]:
    """The first line of each test's docstring, by the test's name without test_."""
    tests = [node for node in ast.parse(TESTS.read_text()).body if isinstance(node, ast.FunctionDef)]
    texts = {test.name.removeprefix("test_"): ast.get_docstring(test) for test in tests}
    return {name: text.splitlines()[0] for name, text in texts.items() if text}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def reads(architecture) -> str:
    """What attention to the cache reads."""
    if architecture.unpacks:
        return "unpacked K and V"
    return "codes" if "p" in architecture.layers else "the library's K and V"


def architecture_table(architectures, cell) -> list[str]:
    kinds = {"p": "packed", "l": "library's", "-": "none"}
    rows = []
    for name, it in architectures.items():
        layers = ", ".join(kinds[letter] for letter in it.layers)
        rows.append([name, f"`{it.model}`", it.note, layers, reads(it), cell("layers", name)])
    head = ["name", "model", "what it brings", "cache of each layer", "attention reads", "test"]
    return ["## The architectures", "", *table(head, rows)]


def operation_tables(architectures, cell, texts) -> list[str]:
    lines = []
    for title, operations in GROUPS.items():
        lines += [f"## {title}", ""]
        lines += [f"- *{operation}*: {texts[operation]}" for operation in operations] + [""]
        rows = [[name, *(cell(operation, name) for operation in operations)] for name in architectures]
        lines += table(["architecture", *operations], rows)
    return lines


def other_tests(names, texts) -> list[str]:
    tests = {}
    for name in (name.removeprefix("test_") for name in names if name.startswith(OTHERS)):
        tests.setdefault(texts[name.split("[")[0]], []).append(f"`{name}`")
    rows = [[text, ", ".join(of_text)] for text, of_text in tests.items()]
    return ["## Refused, moved elsewhere, and added", "", *table(["what", "tests"], rows)]


def tables(names: list[str]) -> str:
    """The generated part of the page, for the names of the tests."""
    sys.path.insert(0, str(TESTS.parent))
    from architectures import ARCHITECTURES
    from test_architectures import LIBRARY_LACKS, REFUSES

    matches = [re.fullmatch(r"test_(\w+)\[(.+)\]", name) for name in names if not name.startswith(OTHERS)]
    cells = {match.groups() for match in matches if match}
    differing = {operation for operation, _ in cells} ^ {operation for group in GROUPS.values() for operation in group}
    if differing:
        raise SystemExit(f"GROUPS and the tests differ: {sorted(differing)}")

    def cell(operation, architecture):
        place = operation, architecture
        if place not in cells:
            raise SystemExit(f"no test_{operation}[{architecture}]")
        mark = "library: no " if place in LIBRARY_LACKS else "refused " if place in REFUSES else ""
        return f"{mark}`{operation}[{architecture}]`"

    texts = legend()
    lines = architecture_table(ARCHITECTURES, cell) + operation_tables(ARCHITECTURES, cell, texts)
    return "\n".join(lines + other_tests(names, texts))


def up_to_date(page: str, names: list[str]) -> str:
    """The page with its tables made anew."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n\n{tables(names)}\n{page[end:]}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(up_to_date(PAGE.read_text(), collected()))


if __name__ == "__main__":
    main()
