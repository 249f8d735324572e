"""The model of Apple GPUs: against the source paper's measurements, against counts by hand, and its page."""

from pathlib import Path

import pytest

from commands import run, run_rows
from halfbyte import metal_model
from halfbyte.recipes import get_recipe
from halfbyte.results import render

M1 = metal_model.CHIPS[0]
PAGE = Path(__file__).parents[2] / "docs" / "metal.md"


@pytest.mark.parametrize(("kernel", "measured"), metal_model.PAPER_ENCODE.items(), ids=str)
def test_the_papers_kernels_lie_between_the_two_bounds(kernel, measured):
    """The one check there is: everything at once is too fast, one part after the other is slow by little or not."""
    together, one_by_one = metal_model.paper_encode(*kernel).ns(M1)
    assert together < measured < 1.15 * one_by_one


def test_transform_counts_of_d_8_by_hand():
    # A complex transform of 4: two passes of radix 2. Bytes: 8 floats written; twice read and written; unpacked from
    # two places, written once. Operations: 2 passes × 2 butterflies × 10, and 6 a channel to unpack.
    assert metal_model._transform(8) == (4 * 8 * (1 + 4 + 3), 40 + 48)
    assert metal_model._passes(40) == [2, 2, 2, 5]
    assert [metal_model._own_passes(n) for n in (32, 40, 48, 64, 128)] == [[8, 4], [8, 5], [8, 2, 3], [8, 8], [8, 8, 2]]
    # Two passes of ours: 4 bytes × 128 channels, written, twice read and written, unpacked, read by the quantiser.
    assert metal_model.encode(128, get_recipe("default")).threadgroup_bytes == 4 * 128 * 8


def test_bytes_are_those_of_the_format():
    work = metal_model.encode(128, get_recipe("default"))
    assert work.device_bytes == 2 * 128 + 64 + 4 * 2
    assert metal_model.attend(metal_model.GEOMETRIES["qwen"], get_recipe("default")).device_bytes == 138


def test_attention_is_counted_as_its_kernel_computes():
    """By hand, for rows in registers: qwen has 6 of 8 (d 128), gemma 4 of 4 (d 256), smollm2 3 of 4 (d 64)."""
    recipe = get_recipe("fixed-offset")
    qwen, gemma, small = (metal_model.attend(metal_model.GEOMETRIES[n], recipe) for n in ("qwen", "gemma", "smollm2"))
    # 256 codes a token: 5 operations to unpack, 8 products; 31 additions for each of 8 rows; values times the block's
    # factor, a sixteenth of them a token; 20 a row for the softmax.
    assert qwen.operations == 256 * 13 + 31 * 8 + 8 * 128 / 16 + 20 * 8
    assert gemma.operations == 512 * 9 + 31 * 4 + 4 * 256 / 16 + 20 * 4
    assert small.operations == 128 * 9 + 15 * 4 + 4 * 64 / 16 + 20 * 4  # 16 lanes share a token
    # Floats: sums that change lanes; a weight to 32 lanes for each row; factors and two or three maxima a block.
    assert qwen.shuffle_bytes == 4 * (31 * 8 + 32 * 8 + (32 * 8 + 32 * 2) / 16)
    assert small.shuffle_bytes == 4 * (15 * 4 + 32 * 4 + (32 * 4 + 32 * 3) / 16)
    assert qwen.threadgroup_bytes == 0
    turning = metal_model.attend(metal_model.GEOMETRIES["qwen"], get_recipe("turning"))
    assert turning.threadgroup_bytes == 64 * 2 * 4 * 8 / 16  # 64 pairs of products a row, once in 16 tokens
    # More than a simdgroup's rows: codes are unpacked again.
    many = metal_model.attend(metal_model.GEOMETRIES["gemma"]._replace(heads=8), recipe)
    assert many.operations == 2 * gemma.operations
    assert many.device_bytes == gemma.device_bytes


def test_floor_of_a_token_is_weights_and_cache_over_bandwidth():
    rows = {(r["model"], r["prefix"], r["chip"]): r for r in metal_model.predict_generate()}
    row = rows["Qwen2.5-1.5B", 1024, "M1"]
    weights, cache = 2 * 1.544e9, 28 * 1024 * 2 * 128 * 4
    assert row["fp16_floor_ms"] == pytest.approx((weights + cache) / (68.25e9 * 0.94) * 1e3)
    assert row["fp16_floor_ms"] < row["paper_fp16_ms"]
    # 22 sliding layers stop at their window.
    gemma = metal_model.MODELS["Gemma-3-1B"]
    assert gemma.tokens(4096) - gemma.tokens(2048) == 4 * 2048


def test_a_faster_chip_is_predicted_faster_and_memory_limits_threads():
    for row in metal_model.predict_encode():
        assert row["M4 Max"] < row["M1 Max"] < row["M1"]
    work = metal_model.Work(1, 1, 1, threads=256, threadgroup_memory=30 << 10)
    assert work.threads_per_core == 2 * 256
    assert work._replace(threadgroup_memory=0).threads_per_core == 3 * 256  # registers
    assert work._replace(threadgroup_memory=0, registers=104).threads_per_core == 2 * 256


def test_command_writes_every_row_and_says_prediction(tmp_path):
    document = run_rows(tmp_path, "doctor", "--device", "mps", "--predict")
    assert document["prediction"] is True
    assert {row["table"] for row in document["rows"]} == {"encode", "attend", "generate"}
    assert "not measurements" in run("doctor", "--device", "mps", "--predict").output


def test_page_shows_what_the_model_gives():
    """docs/metal.md is written by hand; its tables are not allowed to drift from the program."""
    text = PAGE.read_text()
    for rows in (metal_model.predict_encode(), metal_model.predict_attend()):
        for row in metal_model.table(rows, "ns"):
            line = "| " + " | ".join(render(value) for value in row.values()) + " |"
            assert line in text
