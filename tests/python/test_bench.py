"""The benches: rows that hold together, fair arms, plots that show something."""

import re
import statistics

import pytest

from commands import GENERATE_KEYS, at_home, run, run_rows  # noqa: F401 (a fixture)
from halfbyte import _native, bench, bench_generate, plots, report, results
from halfbyte.roofline import roofline_rows


def check_ratio(row, over, under, seconds=None):
    """The stated ratio is the median of the rounds', and lies in its spread."""
    seconds = seconds or {name: row["rounds"][f"{name}_s"] for name in (over, under)}
    each = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    name = f"{over}_over_{under}"
    assert row[name] == pytest.approx(statistics.median(each))
    lower, upper = row[f"{name}_spread"]
    assert min(each) <= lower <= row[name] <= upper <= max(each)


def test_arms_take_turns_and_rounds_stay_apart(monkeypatch):
    clock, asked = [0.0], []

    def arm(name, cost):
        def call():
            asked.append(name)
            clock[0] += cost

        return call

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench.time, "sleep", lambda s: None)
    seconds = bench.time_alternately({"slow": arm("slow", 1.0), "quick": arm("quick", 0.5)}, 3)
    assert seconds == {"slow": [1.0] * 3, "quick": [0.5] * 3}
    assert asked == ["slow", "slow", "quick", "quick"] + ["slow", "quick"] * 3
    assert bench.ratio(seconds, "slow", "quick") == {"slow_over_quick": 2.0, "slow_over_quick_spread": [2.0, 2.0]}


def test_the_spread_is_the_quartiles():
    assert bench.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == [2.0, 4.0]
    assert bench.quartiles([7.0]) == [7.0, 7.0]


def test_tables_show_a_spread_beside_its_value():
    row = {"x": 2.0, "x_spread": [1.5, 2.5], "rounds": {"a_s": [1.0]}, "windows": [1, 2]}
    assert results.cells(row) == {"x": "2.00 (1.50–2.50)"}
    outcome = run("bench", "attend", "--queries", 2, "--tokens", 64, "--threads", 1, "--rounds", 1, "--quiet")
    assert re.search(r"\d \(\d+\.?\d*–\d+\.?\d*\)", outcome.output)


def test_bench_attend_writes_its_rows(tmp_path):
    plot = tmp_path / "roofline.png"
    document = run_rows(tmp_path, "bench", "attend", "--tokens", "64,256", "--threads", "1,2", "--rounds", 3,
                        "--recipe", "default,k8v4", "--plot", plot, "--quiet")  # fmt: skip
    keys = ["geometry", "heads", "kv_heads", "head_dim", "backend", "recipe", "tokens", "threads", "fp16_ns", "int4_ns",
            "sdpa_ns", "sdpa_folded_ns"]  # fmt: skip
    rows = document["rows"]
    assert [list(row)[: len(keys)] for row in rows] == [keys] * 8
    cells = [("default", 64, 1), ("default", 64, 2), ("default", 256, 1), ("default", 256, 2)]
    cells += [("k8v4", tokens, threads) for _, tokens, threads in cells]
    assert [(row["recipe"], row["tokens"], row["threads"]) for row in rows] == cells
    for row in rows:
        for arm in ("fp16", "int4", "sdpa", "sdpa_folded"):
            assert len(row["rounds"][f"{arm}_s"]) == 3
            ns = statistics.median(row["rounds"][f"{arm}_s"]) * 1e9 / (row["tokens"] * 2)
            assert row[f"{arm}_ns"] == pytest.approx(ns)
            if arm != "int4":
                check_ratio(row, arm, "int4")
        roofs = row["roofs"]
        # K: 4 bits and 16 of scale for 32 channels, or 8; V: 4 and 16 for 128.
        assert roofs["int4_bytes"] == 128 * ((4 if row["recipe"] == "default" else 8) + 0.5 + 4 + 0.125) / 8
        assert roofs["fp16_bytes"] == 512
        share = roofs["int4_bytes"] / row["int4_ns"] / roofs["read_gb_per_s"]
        assert row["read_bandwidth_share"] == pytest.approx(share)
        assert min(roofs.values()) > 0
    assert_draws(plot)


def test_bench_attend_takes_geometries_and_backends(tmp_path):
    words = ["bench", "attend", "--tokens", 64, "--threads", 1, "--rounds", 1, "--quiet"]
    document = run_rows(tmp_path, *words, "--geometry", "gemma,smollm2", "--backend", "scalar,reference")
    found = [
        (row["geometry"], row["heads"], row["kv_heads"], row["head_dim"], row["backend"]) for row in document["rows"]
    ]
    shapes = [("gemma", 4, 1, 256), ("smollm2", 9, 3, 64)]
    assert found == [(*shape, backend) for backend in ("scalar", "reference") for shape in shapes]
    own = run_rows(tmp_path, *words, "--heads", 4, "--head-dim", 32)["rows"]
    assert [(row["geometry"], row["heads"], row["kv_heads"], row["head_dim"]) for row in own] == [("own", 4, 2, 32)]
    assert own[0]["backend"] == _native.backend() != "reference"  # what it was before


def test_bench_attend_with_several_queries_writes_its_rows(tmp_path):
    document = run_rows(tmp_path, "bench", "attend", "--queries", "2,5", "--tokens", 64, "--threads", 1, "--rounds", 3,
                        "--quiet")  # fmt: skip
    assert [(row["prefix"], row["queries"]) for row in document["rows"]] == [(64, 2), (64, 5)]
    for row in document["rows"]:
        assert row["int4_ms"] == pytest.approx(statistics.median(row["rounds"]["int4_s"]) * 1e3)
        assert row["unpack"].split(", ")[0] in ("float32", "bfloat16")
        check_ratio(row, "unpack", "int4")


@pytest.mark.parametrize("queries", [2, 40])
def test_all_ways_to_attend_a_prefix_agree(queries):
    import torch

    from halfbyte.bench_attend import _queries_arms

    recipe = bench.get_recipe("default")
    packed, make = _queries_arms(bench.Geometry("own", 6, 2, 64), 100, queries, recipe, 2, 3)
    arms = make(queries)
    assert len(arms) == 4
    with torch.inference_mode():
        outs = {name: call().float() for name, call in arms.items()}
        ours = packed().float()
    exact = outs["float32"]
    for name, out in outs.items():
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-5 if "float32" in name and "b" not in name else 0.03)
    # Tokens of the prefix's last, unfinished block are raw on both sides; those of the new ones are packed on ours only
    # behind each query's own block: 4-bit noise on few tokens, and bytes for queries and weights.
    assert (ours - exact).square().mean() < 0.1**2 * exact.square().mean()


def test_the_floor_is_the_longer_of_reading_and_computing():
    row = {"geometry": "own", "backend": "avx2", "recipe": "default", "tokens": 64, "threads": 1}
    row |= {"heads": 6, "kv_heads": 1, "head_dim": 100, "int4_ns": 50.0, "fp16_ns": 80.0}
    row["roofs"] = {"int4_bytes": 100.0, "int4_set_gb_per_s": 20.0, "dot_gops": 600.0}
    row["roofs"] |= {"fp16_bytes": 400.0, "fp16_set_gb_per_s": 20.0, "fma_gflops": 60.0}
    int4, fp16 = roofline_rows([row])
    # 6 heads × 100 channels × (K, V) × (product, sum) = 2400 operations.
    assert (int4["floor_ns"], int4["bound"], int4["share"]) == (5.0, "memory", 0.1)
    assert (fp16["floor_ns"], fp16["bound"], fp16["share"]) == (40.0, "arithmetic", 0.5)
    assert (int4["operations_per_byte"], int4["gops"], fp16["gops"]) == (24.0, 48.0, 30.0)


def assert_draws(file):
    """A PNG of some size, on this project's paper, with more than paper on it."""
    from PIL import Image

    image = Image.open(file).convert("RGB")
    assert min(image.size) >= 600
    paper = tuple(int(plots.PAPER[i : i + 2], 16) for i in (1, 3, 5))
    assert image.getpixel((1, 1)) == paper
    assert len(image.getcolors(1 << 24)) > 20


def test_bench_roofline_writes_and_draws(tmp_path):
    plot = tmp_path / "roofline.png"
    document = run_rows(tmp_path, "bench", "roofline", "--geometry", "smollm2,qwen", "--tokens", "64,1024",
                        "--threads", 1, "--rounds", 1, "--plot", plot, "--quiet")  # fmt: skip
    assert [(row["geometry"], row["tokens"]) for row in document["rows"]] == [
        ("smollm2", 64), ("smollm2", 1024), ("qwen", 64), ("qwen", 1024)]  # fmt: skip
    assert "sdpa_ns" not in document["rows"][0]
    assert document["roofline"] == roofline_rows(document["rows"])
    assert [row["kernel"] for row in document["roofline"]] == ["int4", "fp16"] * 4
    assert all(row["share"] > 0 for row in document["roofline"])
    assert_draws(plot)


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run("bench", "generate", "--plot", tmp_path / "plot.png")
    assert outcome.exit_code == 2
    assert "plot: needs matplotlib" in outcome.stderr
    assert "halfbyte[plot]" in outcome.stderr


def test_bench_encode_writes_its_rows(tmp_path):
    document = run_rows(tmp_path, "bench", "encode", "--head-dim", 96, "--vectors", 512, "--rounds", 3,
                        "--backend", "scalar")  # fmt: skip
    assert {"default", "no-search", "paper-per-token", "g16"} <= {row["recipe"] for row in document["rows"]}
    assert "srht" not in {row["recipe"] for row in document["rows"]}  # 96 is no power of two
    base = next(row for row in document["rows"] if row["recipe"] == "no-search")
    for row in document["rows"]:
        assert row["backend"] == "scalar"
        assert row["ns_per_vector"] == statistics.median(row["rounds"]["ns"]) > 0
        each = [a / b for a, b in zip(row["rounds"]["ns"], base["rounds"]["ns"], strict=True)]
        assert row["over_no_search"] == pytest.approx(statistics.median(each))


def test_bench_generate_writes_its_rows(tmp_path):
    plot = tmp_path / "generate.png"
    document = run_rows(
        tmp_path,
        "bench",
        "generate",
        "--prefix",
        "256,512",
        "--new-tokens",
        2,
        "--rounds",
        1,
        "--plot",
        plot,
        "--quiet",
    )
    assert [list(row) for row in document["rows"]] == [GENERATE_KEYS] * 2
    assert "rounds" not in report.table(document["rows"])
    for row in document["rows"]:
        # 4 layers, K and V, 2 heads of 128 channels of bfloat16 a token; 2 + 2 tokens were decoded.
        assert row["fp_cache_bytes"] == (row["prefix"] + 4) * 4 * 2 * 2 * 128 * 2
        assert 0 < row["int4_cache_bytes"] < row["fp_cache_bytes"]
        both = row["dtype"].split(" / ") * 2
        seconds = {"fp": row["rounds"][f"fp_{both[0]}_s"], "int4": row["rounds"][f"int4_{both[1]}_s"]}
        check_ratio(row, "int4", "fp", seconds)
        for side in ("fp", "int4"):
            assert row[f"{side}_ms_per_token"] == pytest.approx(statistics.median(seconds[side]) * 1e3)
            assert seconds[side] == min(row["rounds"][f"{side}_{dtype}_s"] for dtype in ("float32", "bfloat16"))
    assert_draws(plot)


def test_bench_glue_writes_its_rows(tmp_path):
    document = run_rows(tmp_path, "bench", "glue", "--prefix", "64,300", "--new-tokens", 20, "--layers", 2)
    keys = ["prefix", "int4_us_per_layer", "glue_us_per_layer", "extension_calls", "fp_us_per_layer",
            "fp_glue_us_per_layer"]  # fmt: skip
    assert [list(row) for row in document["rows"]] == [keys] * 2
    assert [row["prefix"] for row in document["rows"]] == [64, 300]
    for row in document["rows"]:
        assert row["extension_calls"] == 2
        assert 0 < row["glue_us_per_layer"] < row["int4_us_per_layer"]
        assert 0 < row["fp_glue_us_per_layer"] < row["fp_us_per_layer"]


def test_held_bytes_counts_what_a_view_keeps_alive(gemma, text):
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=gemma.config)
    with torch.inference_mode():
        gemma.set_attn_implementation("sdpa")
        gemma(text, past_key_values=cache, use_cache=True)
    # All four layers hold the whole prompt: the sliding ones keep a view of it until the next token comes.
    assert bench_generate.held_bytes(cache) == 4 * 2 * 640 * 256 * 4


def test_each_side_decodes_with_its_own_attention(gemma, text, monkeypatch):
    from halfbyte.hf import Int4Cache

    gemma.set_attn_implementation("sdpa")
    seen = []
    decode = bench_generate.DecodeArm.decode
    monkeypatch.setattr(
        bench_generate.DecodeArm,
        "decode",
        lambda arm, count: (
            seen.append((type(arm.cache) is Int4Cache, gemma.config._attn_implementation)) or decode(arm, count)
        ),
    )
    arms = {packed: bench_generate.make_arm(gemma, text[0, :64], packed) for packed in (False, True)}
    bench_generate.decode_times(arms, new_tokens=2, rounds=2)
    assert seen == [(False, "sdpa"), (True, "halfbyte")] * 3


@pytest.mark.parametrize("name", ["tiny-qwen", "tiny-gemma"])
def test_the_bfloat16_model_is_the_one_that_loading_gives(name):
    import torch

    from halfbyte.models import load_model

    ids = torch.arange(1, 40)[None]
    converted, loaded = bench_generate.load_in_dtypes(name)[0]["bfloat16"], load_model(name, "bfloat16")[0]
    with torch.inference_mode():
        assert torch.equal(converted(ids).logits, loaded(ids).logits)
    assert converted.dtype is torch.bfloat16
