"""The benches of --backend cuda: rows that hold together where there is a GPU, a plain word where there is none."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from commands import at_home, run, run_rows  # noqa: E402, F401 (a fixture)
from halfbyte import _cuda  # noqa: E402

NO_GPU = not torch.cuda.is_available() or _cuda.why_not(0) is not None
needs_gpu = pytest.mark.skipif(NO_GPU, reason="no CUDA device with libhalfbyte_cuda")


@pytest.mark.skipif(not NO_GPU, reason="there is a CUDA device")
@pytest.mark.parametrize("what", ["attend", "encode", "generate"])
def test_without_a_gpu_the_reason_is_said(what):
    options = ["--model", "qwen2.5-1.5b"] if what == "generate" else []
    outcome = run("bench", what, "--backend", "cuda", *options)
    assert outcome.exit_code == 2
    assert "backend: cuda can not run here: " in outcome.stderr


def test_what_does_not_go_together_is_refused():
    outcome = run("bench", "attend", "--backend", "cuda", "--queries", "4")
    assert outcome.exit_code == 2
    assert "cuda takes neither --queries nor --plot" in outcome.stderr
    outcome = run("bench", "generate", "--backend", "avx2")
    assert outcome.exit_code == 2
    assert "backend: got 'avx2'" in outcome.stderr


@needs_gpu
def test_rows_hold_together(tmp_path):
    rows = run_rows(tmp_path, "bench", "attend", "--backend", "cuda", "--tokens", "256,1000", "--quiet")["rows"]
    assert [row["tokens"] for row in rows] == [256, 1000]
    for row in rows:
        assert row["sdpa_folded_over_int4"] == pytest.approx(row["sdpa_folded_us"] / row["int4_us"])
        assert row["distance"] < 0.15  # 4 bits of random normal values
    rows = run_rows(tmp_path, "bench", "encode", "--backend", "cuda", "--vectors", "4096")["rows"]
    assert [(row["dtype"], row["search"]) for row in rows] == [
        (dtype, search) for dtype in ("float16", "bfloat16") for search in (True, False)
    ]
    assert all(row["of_copy"] == pytest.approx(row["tb_per_s"] / row["copy_tb_per_s"]) for row in rows)
