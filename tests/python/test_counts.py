"""The check of instruction counts: what it takes for a regression, and what it reads from callgrind."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("check_counts", ROOT / "tools" / "check_counts.py")
check_counts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_counts)


@pytest.mark.parametrize(
    ("instructions", "complaint"),
    [(10_000, None), (10_200, None), (10_201, "+2.0%"), (20_000, "+100.0%"), (9_500, None), (9_499, "better")],
)
def test_the_bounds_are_two_percent_up_and_five_down(instructions, complaint):
    lines = check_counts.compare({"encode": 10_000}, {"encode": instructions})
    assert len(lines) == (complaint is not None)
    assert complaint is None or (complaint in lines[0] and lines[0].startswith("encode: "))


def test_cases_that_come_or_go_are_complaints():
    lines = check_counts.compare({"old": 1}, {"new": 1})
    assert [line.split(":")[0] for line in lines] == ["new", "old"]


def test_the_total_of_a_dump():
    assert check_counts.total("version: 1\nevents: Ir\n\nfn=(1)\n3 77\ntotals: 1234\n") == 1234


def test_another_compiler_skips_and_says_so(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++ (Somewhere 99.1) 99.1'\n")
    compiler.chmod(0o755)
    words = [sys.executable, ROOT / "tools" / "check_counts.py", "no-such-program", compiler]
    outcome = subprocess.run(words, capture_output=True, text=True)
    assert outcome.returncode == check_counts.SKIPPED
    assert "this is g++ (Somewhere 99.1) 99.1" in outcome.stdout


def test_the_recorded_counts_are_of_every_backend_counted():
    recorded = json.loads(check_counts.EXPECTED.read_text())
    cases = {}
    for name, instructions in recorded["instructions"].items():
        assert instructions > 0
        cases.setdefault(name.split(": ")[0], []).append(name.split(": ")[1])
    assert tuple(cases) == check_counts.BACKENDS
    assert cases["scalar"] == cases["avx2"]
    assert recorded["compiler"]
