"""The command line: help, rows and files as documented, and one clear line for every bad input."""

import json
import subprocess
import sys

import pytest

from commands import GENERATE_KEYS, at_home, run, run_rows  # noqa: F401 (a fixture)
from halfbyte import demo, results

COMMANDS = (["demo"], ["bench", "attend"], ["bench", "roofline"], ["bench", "encode"], ["bench", "generate"],
            ["bench", "glue"], ["recipes"], ["eval"], ["calibrate"], ["reproduce"], ["report"], ["doctor"])  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_with_an_example(command):
    outcome = run(*command, "--help")
    assert outcome.exit_code == 0
    assert "Example" in outcome.output
    assert "halfbyte " + command[0] in outcome.output


def test_help_does_not_import_torch():
    code = ("import sys; from typer.testing import CliRunner; from halfbyte import cli; "
            "assert CliRunner().invoke(cli.app, ['eval', '--help']).exit_code == 0; "
            "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--text", "TEXT", "--recipe", "fp,none"], "'none'.*default.*no-offset.*paper-per-token.*k8v4.*fp"),
        (["eval", "--text", "missing.txt"], "text: cannot read 'missing.txt': No such file"),
        (["eval", "--text", "TEXT", "--calib", "missing.txt"], "calib: cannot read 'missing.txt'"),
        (["eval", "--text", "TEXT", "--model", "./missing"], "model: no folder './missing'"),
        (["eval", "--text", "TEXT", "--dtype", "int3"], "dtype: got 'int3'; takes one of float32"),
        (["eval", "--text", "TEXT", "--windows", "99"], "text: has .* tokens, 99 windows of 2048"),
        (["bench", "generate", "--recipe", "none"], "'none'.*default"),
        (["bench", "generate", "--prefix", "12,x"], "prefix: got '12,x'; takes whole numbers"),
        (["bench", "generate", "--prefix", "99999"], "prefix: 99999 and .* exceed the 32768 positions"),
        (["bench", "attend", "--tokens", "0"], "tokens: got 0; takes numbers of at least 16"),
        (["bench", "attend", "--heads", "5"], "heads: got 5; takes a multiple of kv_heads"),
        (["bench", "attend", "--recipe", "paper-g32-lambda"], "recipe: one with lambda needs a calibration"),
        (["bench", "attend", "--geometry", "qwen,opt"], "geometry: got 'opt'; takes some of qwen, gemma"),
        (["bench", "attend", "--backend", "sse"], "backend is 'sse'; on this CPU it takes one of"),
        (["bench", "attend", "--queries", "1"], "queries: got 1; takes numbers of at least 2"),
        (["bench", "attend", "--queries", "4", "--plot", "a.png"], "plot: draws attention of one new token"),
        (["bench", "attend", "--plot", "missing/a.png"], "plot: the folder .*missing' does not exist"),
        (["bench", "encode", "--head-dim", "33", "--vectors", "4"], "33"),
        (["bench", "encode", "--vectors", "0"], "vectors: got 0"),
        (["bench", "glue", "--heads", "5"], "heads: got 5; takes a multiple of kv_heads"),
        (["bench", "glue", "--prefix", "8"], "prefix: got 8; takes numbers of at least 16"),
        (["bench", "glue", "--recipe", "paper-g32-lambda"], "recipe: one with lambda needs a calibration"),
        (["demo", "--prefix", "2"], "prefix: got 2; takes numbers of at least 16"),
        (["demo", "--prefix", "32768", "--model", "tiny-qwen"], "exceed the 32768 positions of 'tiny-qwen'"),
        (["doctor", "--json", "missing/rows.json"], "json: the folder .*missing' does not exist"),
        (["doctor", "--device", "tpu"], "device: got 'tpu'; takes cpu or mps"),
        (["doctor", "--predict"], "predict: only Apple's GPUs are predicted"),
        (["eval", "--text", "TEXT", "--protocol", "x"], "protocol: got 'x'; takes one of packed, blocks"),
        (["eval", "--text", "TEXT", "--seeds", "a"], "seeds: got 'a'; takes whole numbers"),
        (["calibrate", "--out", "missing/c.safetensors"], "out: the folder .*missing' does not exist"),
        (["calibrate", "--out", "c.safetensors", "--learn", "x"], "kind: got 'x'; takes one of lambda, cayley"),
        (["reproduce", "--text", "TEXT", "--table", "x"], "tables: got 'x'; takes some of rotation, ladder"),
        (["report", "missing.json"], "json: 'missing.json' is not a file that --json wrote"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_line_and_status_2(tmp_path, monkeypatch, words, message):
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A short text. " * 50)
    outcome = run(*("text.txt" if word == "TEXT" else word for word in words))
    assert outcome.exit_code == 2, outcome.output
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("halfbyte: ") and "busy" not in line]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in outcome.output


def test_eval_writes_its_rows(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the old mill, and the miller counts his sacks. " * 60)
    document = run_rows(tmp_path, "eval", "--text", text, "--recipe", "fp,default", "--windows", 2, "--window", 128,
                        "--seeds", 5, "--quiet")  # fmt: skip
    keys = ["recipe", "bits", "ppl", "delta_ppl", "kl", "kl_p99", "top1", "kl_by_position"]
    assert [list(row) for row in document["rows"]] == [keys] * 2
    assert [row["recipe"] for row in document["rows"]] == ["fp", "default"]
    assert document["seeds"] == {"seeds": [5]}
    assert document["rows"][0]["kl"] == 0 < document["rows"][1]["kl"]


def test_demo_shows_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SCORED_TOKENS", 128)
    monkeypatch.setattr(demo, "SHOWN_TOKENS", 8)
    file = tmp_path / "rows.json"
    outcome = run("demo", "--model", "tiny-gemma", "--prefix", "64,300", "--quiet", "--json", file)
    assert outcome.exit_code == 0, outcome.output
    rows = json.loads(file.read_text())["rows"]
    assert [list(row) for row in rows] == [[*GENERATE_KEYS, "ppl_fp", "ppl_int4", "kl", "top1"]] * 2
    for row in rows:
        assert 0 < row["kl"] < 0.05
        assert row["top1"] > 0.8
        assert row["ppl_int4"] == pytest.approx(row["ppl_fp"], rel=0.05)
    for shown in ("full cache", "packed cache", "of 8 tokens equal", "sampled from tiny-gemma (seed 0)"):
        assert shown in outcome.output


def test_calibrate_writes_a_file_that_loads(tmp_path, qwen):
    from halfbyte.calibrate import Calibration

    file = tmp_path / "c.safetensors"
    outcome = run("calibrate", "--out", file, "--tokens", 64, "--quiet")
    assert outcome.exit_code == 0, outcome.output
    assert Calibration.load(file, qwen).tokens == 64


def test_learning_evaluating_and_reporting_fit_together(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the old mill, and the miller counts his sacks. " * 60)
    file, options = tmp_path / "c.safetensors", ["--text", text, "--quiet"]
    outcome = run("calibrate", *options, "--recipe", "default", "--learn", "lambda", "--steps", 2, "-o", file)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.count("loss") == 8
    size = ["--windows", 1, "--window", 128]
    document = run_rows(tmp_path, "eval", *options, *size, "--recipe", "default,learned", "--calibration", file)
    assert [row["recipe"] for row in document["rows"]] == ["default", "learned"]
    rows = run_rows(tmp_path, "reproduce", *options, *size, "--table", "seeds,memory")["rows"]
    assert [row["table"] for row in rows] == ["seeds"] * 2 + ["memory"] * 3
    outcome = run("report", tmp_path / "rows.json", "-o", tmp_path / "report.html")
    assert outcome.exit_code == 0, outcome.output
    assert "2 sections" in outcome.output
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_doctor_passes_here_and_fails_when_a_backend_is_wrong(tmp_path, monkeypatch):
    from halfbyte import doctor

    monkeypatch.setattr(doctor, "TAIL_TOKENS", (1, 33))
    document = run_rows(tmp_path, "doctor", "--quiet")
    assert all(row["ok"] for row in document["rows"])
    assert {"reference: attention", "generate"} <= {row["check"] for row in document["rows"]}
    exact = doctor._plain_attention
    monkeypatch.setattr(doctor, "_plain_attention", lambda *args: -exact(*args))
    outcome = run("doctor", "--quiet")
    assert outcome.exit_code == 1
    assert "NO" in outcome.output


def test_a_failed_write_leaves_no_half_file(tmp_path):
    with pytest.raises(ValueError, match=r"NaN|JSON"):
        results.write_json(tmp_path / "rows.json", [{"x": float("nan")}], "command")
    assert list(tmp_path.iterdir()) == []
