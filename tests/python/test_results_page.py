"""The results page: what is met is computed from the files, and nothing outside the marks is touched."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("results_page", ROOT / "tools" / "results_page.py")
page = importlib.util.module_from_spec(spec)
sys.modules["results_page"] = page  # a dataclass looks its module up
spec.loader.exec_module(page)

MACHINE = {"cpu": "A CPU", "cores": 2, "memory_bytes": 4 << 30, "load_average": 0.1, "backend": "avx2", "torch": "2",
           "transformers": "5", "python": "3", "read_gb_per_s": {"1": 20.0, "2": 30.0}, "dot_gops": {"1": 200.0},
           "fma_gflops": {"1": 100.0}}  # fmt: skip


def document(*rows):
    return {"commit": "abc", "command": "halfbyte bench something", "machine": MACHINE, "rows": list(rows)}


def attend_row(tokens, ratio, threads=1):
    row = {"geometry": "qwen", "tokens": tokens, "threads": threads, "fp16_over_int4": ratio}
    row |= {"fp16_over_int4_spread": [ratio - 0.1, ratio + 0.1]}
    return row | {"sdpa_over_int4": 7.9, "read_bandwidth_share": 0.7}


def claim_lines(documents):
    return [line for line in page.claims_table(documents).splitlines()[2:] if line]


def test_met_is_computed_from_the_rows():
    lines = claim_lines({"attend": document(attend_row(4096, 2.5), attend_row(32768, 2.79, threads=2))})
    assert lines == [
        "| qwen, 4096 tokens: our fp16 / int4 | 1 | 2.5 (2.4–2.6) | ≥ 2.5 | met |",
        "| qwen, 32768 tokens: our fp16 / int4 | 2 | 2.79 (2.69–2.89) | ≥ 2.8 | **not met** |",
        "| qwen, 4096 tokens: sdpa bf16 as transformers calls it / int4 | 1 | 7.9 | ≥ 8 | **not met** |",
        "| qwen, 32768 tokens: sdpa bf16 as transformers calls it / int4 | 2 | 7.9 | ≥ 8 | **not met** |",
        "| qwen, 32768 tokens: share of read bandwidth | 2 | 0.7 | ≥ 0.6 | met |",
    ]


def test_targets_from_above_and_derived_columns():
    rows = [{"prefix": 256, "int4_over_fp": 1.0}, {"prefix": 16384, "int4_over_fp": 0.61}]
    lines = claim_lines({"generate-qwen": document(*rows)})
    assert [line.split("|")[4:6] for line in lines] == [[" ≤ 1 ", " met "], [" ≤ 0.6 ", " **not met** "]]
    row = page.with_bytes_ratio({"prefix": 4096, "fp_cache_bytes": 35, "int4_cache_bytes": 10})
    assert row["bytes_ratio"] == 3.5


def test_the_script_runs_commands_that_exist_and_writes_every_file_that_claims_read(tmp_path):
    """With a stand-in for the program, which notes what it was asked for and leaves files without rows."""
    from commands import run

    stub, log, text = tmp_path / "halfbyte", tmp_path / "log", tmp_path / "cpu.md"
    empty = json.dumps(document() | {"roofline": []})
    stub.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        f"open({str(log)!r}, 'a').write('\\n'.join(sys.argv[1:]) + '\\n\\n')\n"
        f"Path(sys.argv[sys.argv.index('--json') + 1]).write_text({empty!r})\n"
    )
    stub.chmod(0o755)
    text.write_text(page.BEGIN + page.END)
    words = [ROOT / "tools" / "measure_cpu.sh", tmp_path / "cpu"]
    environment = os.environ | {"HALFBYTE": str(stub), "PYTHON": sys.executable}
    subprocess.run(words, env=environment, check=True, capture_output=True, timeout=60)
    assert {claim.file for claim in page.CLAIMS} <= {path.stem for path in (tmp_path / "cpu").glob("*.json")}
    commands = [command.split("\n") for command in log.read_text().strip().split("\n\n")]
    assert len(commands) >= 9
    for command in commands:
        outcome = run(*command, "--help")  # an option that does not exist is refused before help is shown
        assert outcome.exit_code == 0, outcome.output
    assert "Against the targets" in text.read_text()


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    folder, text = tmp_path / "cpu", tmp_path / "cpu.md"
    folder.mkdir()
    text.write_text(f"before\n{page.BEGIN}stale\n{page.END}after\n")
    with pytest.raises(SystemExit, match="holds no JSON"):
        page.main(folder)
    (folder / "attend.json").write_text(json.dumps(document(attend_row(4096, 2.6))))
    (folder / "roofline.png").touch()
    for _ in range(2):  # again, and nothing grows
        page.main(folder)
        written = text.read_text()
        assert written.startswith(f"before\n{page.BEGIN}")
        assert written.endswith(f"{page.END}after\n")
        assert "stale" not in written
        assert written.count("| 2.6 (2.5–2.7) | ≥ 2.5 | met |") == 1
        assert "![roofline](cpu/roofline.png)" in written
        assert "20–20 on 1, 30–30 on 2 GB/s" in written
        assert "`halfbyte bench something`" in written


def test_the_committed_page_is_what_its_files_give(tmp_path):
    folder = ROOT / "docs" / "results" / "cpu"
    if not folder.exists():
        pytest.skip("not measured yet")
    shutil.copytree(folder, tmp_path / "cpu")
    shutil.copy(folder.with_suffix(".md"), tmp_path / "cpu.md")
    page.main(tmp_path / "cpu")
    assert (tmp_path / "cpu.md").read_text() == folder.with_suffix(".md").read_text()
