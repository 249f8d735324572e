"""The benches of --backend cuda: a plain word where there is no GPU; rows that hold together, there on the emulator."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from commands import at_home, run, run_rows  # noqa: E402, F401 (a fixture)
from halfbyte import _cuda, bench_cuda  # noqa: E402

NO_GPU = not torch.cuda.is_available() or _cuda.why_not(0) is not None


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


@pytest.fixture
def without_clock(cuda, monkeypatch):
    """Without a GPU, calls run once on the emulator, and none is timed."""

    def run_once(call, rounds):
        call()
        return [7.0] * rounds

    if cuda.type == "cpu":
        monkeypatch.setattr(bench_cuda, "check_device", lambda: cuda)
        monkeypatch.setattr(bench_cuda, "copy_tb_per_s", lambda: 2.0)
        monkeypatch.setattr(bench_cuda, "graph_us", run_once)


def test_rows_of_attention_hold_together(without_clock, tmp_path):
    options = "--tokens", "256,1000", "--geometry", "smollm2", "--quiet"
    rows = run_rows(tmp_path, "bench", "attend", "--backend", "cuda", *options)["rows"]
    assert [row["tokens"] for row in rows] == [256, 1000]
    for row in rows:
        assert row["sdpa_folded_over_int4"] == pytest.approx(row["sdpa_folded_us"] / row["int4_us"])
        assert row["tb_per_s"] * row["int4_us"] * 1e6 > 3 * row["tokens"] * 64  # bytes: 3 KV heads, K and V in 4 bits
        assert row["of_copy"] == pytest.approx(row["tb_per_s"] / row["copy_tb_per_s"])
        assert row["distance"] < 0.15  # 4 bits of random normal values


def test_rows_of_packing_hold_together(without_clock, tmp_path):
    options = "--vectors", "256", "--head-dim", "64"
    rows = run_rows(tmp_path, "bench", "encode", "--backend", "cuda", *options)["rows"]
    assert [(row["dtype"], row["search"]) for row in rows] == [
        (dtype, search) for dtype in ("float16", "bfloat16") for search in (True, False)
    ]
    for row in rows:
        assert row["of_copy"] == pytest.approx(row["tb_per_s"] / row["copy_tb_per_s"])
        assert row["tb_per_s"] * row["us"] * 1e6 > 256 * 64 * 2.5  # bytes: 16 bits in, 4 out


def test_caches_take_turns_token_by_token():
    order = []

    class Paced:
        def __init__(self, name, ms):
            self.name, self.ms, self.ms_per_token = name, iter(ms), []

        def decode(self):
            order.append(self.name)
            return next(self.ms)

    arms = [Paced("dynamic", [3.0, 5.0]), Paced("int4", [1.0, 2.0])]
    bench_cuda._decode_round(arms, 2)
    assert order == ["dynamic", "int4"] * 2
    assert [arm.ms_per_token for arm in arms] == [[4.0], [1.5]]
