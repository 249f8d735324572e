"""Runs commands of the program in this process, for the tests of the command line and of the benches."""

import json

import pytest
from typer.testing import CliRunner

from conftest import MODELS
from halfbyte import bench, cli, results

GENERATE_KEYS = ["model", "dtype", "prefix", "fp_ms_per_token", "int4_ms_per_token", "int4_over_fp",
                 "int4_over_fp_spread", "fp_cache_bytes", "int4_cache_bytes", "rounds"]  # fmt: skip


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.setenv("HALFBYTE_MODELS", str(MODELS))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HALFBYTE_TRACEBACK", raising=False)
    # Long rounds and the machine's bandwidth take seconds and are not what these tests are about.
    monkeypatch.setattr(bench, "SLICE_S", 0.001)
    monkeypatch.setattr(results, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 1 << 20)


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def run_rows(tmp_path, *words):
    """The JSON document a command wrote."""
    file = tmp_path / "rows.json"
    outcome = run(*words, "--json", file)
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(file.read_text())
    assert list(document)[:4] == ["halfbyte", "commit", "machine", "command"]
    assert document["machine"]["cores"] >= 1
    for roof in ("read_gb_per_s", "dot_gops", "fma_gflops"):
        assert document["machine"][roof]["1"] > 0
    return document
