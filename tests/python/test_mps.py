"""The Metal kernels as PyTorch calls them, on a stand-in for its calls that runs them in the emulator.

Not run on Apple hardware. Against the CPU's layers: bytes, attention, and generate; test_gpu_layer.py has what all
kernels share.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from commands import run
from conftest import MODELS
from gpu_walk import Walk, relative
from halfbyte import Int4Cache, _native, doctor_mps, metal, mps_kernels, rooms
from halfbyte.gpu_layer import GpuLayer
from halfbyte.mps_kernels import MetalKernels
from halfbyte.mps_pages import MpsPages
from halfbyte.recipes import get_recipe
from metal_standin import bound

CPU = torch.device("cpu")


def config_of(d=64, recipe="default", heads=2, **fields):
    config = {"kv_heads": heads, "head_dim_k": d, "head_dim_v": d, "dtype": "float32", "recipe": get_recipe(recipe)}
    return config | fields


def walk_of(recipe="default", d=64, dtype="float32", batch=1, **options):
    return Walk(MetalKernels, recipe, d, dtype, batch=batch, **options)


# ------------------------------------------------------------------------------------------------- numbers and tables


def test_rotation_tables_hold_the_signs_of_the_format():
    for name, d in (("srft", 80), ("srht", 64)):
        recipe = get_recipe("default", rotation=name, seed=7)
        signs = metal.signs(7, 3, d)
        table = metal.rotation_table(recipe, 3, d)
        assert (np.sign(table[:d]) == signs).all()
        assert table.size == (3 * d if name == "srft" else d)
    # The signs of the worked example in docs/format.md.
    want = [-1, 1, 1, -1, 1, 1, 1, -1, 1, -1, 1, -1, -1, -1, -1, -1]
    assert metal.signs(0, 0, 16).tolist() == want


def test_page_bytes_are_those_of_a_saved_layer():
    for name in ("default", "g16", "k8v4", "paper-per-token"):
        for d in (64, 80, 128):
            layer, x = _native.Layer(**config_of(d, name, 3)), torch.randn(1, 3, 65, d)
            rooms.append_native(layer, x, x, None, False)
            assert layer.save()["pages"].size == MetalKernels(CPU, **config_of(d, name, 3)).page_bytes


def test_numbers_are_as_many_as_the_text_declares(shaders, monkeypatch):
    """Each list of ints fills its struct of src/gpu/arguments.h exactly."""
    text = (Path(__file__).parents[2] / "src" / "gpu" / "arguments.h").read_text()
    sizes = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", re.sub(r"//.*", "", text), re.S):
        total = 0
        for kind, names in re.findall(r"(\w+) ([^;]+);", body):
            counts = [3 if "[kMaxRaw]" in one else 1 for one in names.split(",")]
            total += sum(counts) * (1 if kind == "int64_t" else sizes.get(kind, 1))
        sizes[name] = total
    seen = {}
    monkeypatch.setattr(type(shaders.x), "__call__", lambda self, *args, **kw: seen.update({self.name: len(args[0])}))
    layer = GpuLayer(MetalKernels, CPU, **config_of())
    x = torch.randn(1, 2, 40, 64)
    layer.append(x, x)
    layer.attend(torch.randn(1, 2, 1, 64), torch.empty(1, 1, 2, 64), 1.0, None, None, 0.0, None)
    layer.unpack(40, torch.float32)
    assert seen == {
        "encode_d64_int4": sizes["EncodeNumbers"],
        "decode_d64_int4": sizes["DecodeNumbers"],
        "attend_d64": sizes["AttendNumbers"],
        "finish_d64": sizes["AttendNumbers"],
    }


def test_stand_in_follows_the_rules_of_compile_shader():
    x = torch.arange(10.0)
    assert bound(x[3:], None).data_ptr() == x.data_ptr() + 12  # storage offset
    assert bound(5, None).dtype == torch.int64
    assert bound([1, 2], "int32").dtype == torch.int32
    assert bound((1.0, 2.0), None).dtype == torch.float32
    with pytest.raises(TypeError):
        bound([1, 2.0], None)
    with pytest.raises(TypeError):
        bound(True, None)


# ------------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("d", metal.HEAD_DIMS)
def test_step_by_step_it_is_the_layer_of_the_cpu(shaders, d):
    walk = walk_of("default", d, pairs=d // 2 - 4, seed=d // 16)
    for tokens, queries in ((37, 1), (1, 1), (3, 3), (9, 9), (1, 1)):
        walk.append(tokens)
        walk.check(queries)


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        ("g16", "float16"),
        ("k8v4", "bfloat16"),
        ("paper-per-token", "float16"),
        ("paper-g32", "bfloat16"),
        ("no-offset", "float16"),
        ("no-sinks", "bfloat16"),
    ],
)
def test_recipes_and_dtypes(shaders, recipe, dtype):
    walk = walk_of(recipe, 64, dtype, batch=2)
    for tokens, queries in ((7, 1), (19, 19), (1, 1)):
        walk.append(tokens)
        walk.check(queries)


def test_srht_lambda_windows_and_a_given_offset(shaders):
    walk = walk_of("default", 128, rotation="srht", lambda_=True, raw_window=16, offset_tokens=32)
    factors = [torch.rand(2, 128) + 0.5 for _ in "kv"]
    mu = torch.randn(2, 128)
    walk.both("set_lambda", *(x.data_ptr() for x in factors))
    walk.both("set_offset", mu.data_ptr(), 0)
    for tokens, queries in ((20, 1), (20, 20), (25, 25), (1, 1)):
        walk.append(tokens)
        walk.check(queries)
    with pytest.raises(ValueError, match="after tokens were packed"):
        walk.ours.set_lambda(factors[0].data_ptr(), 0)
    walk.restore()
    walk.check()


def test_a_dense_rotation(shaders):
    walk = walk_of(rotation="dense")
    matrix = torch.linalg.qr(torch.randn(64, 64))[0].contiguous()
    walk.both("set_rotation", matrix.data_ptr(), matrix.data_ptr())
    walk.append(40)
    walk.check()
    walk.restore()
    walk.append(1)
    walk.check()


def test_windows_drop_pages_and_reuse_them(shaders):
    walk = walk_of(window=40, pairs=32)
    for tokens in (90, 1, 17, 30, 45, 1):
        walk.append(tokens)
        if tokens < 20:
            walk.check(tokens)
    pages = walk.ours._pages
    assert len(pages.numbers[0]) <= 3
    assert len(pages.pool.holders) <= 8


def test_crop_back_and_go_on(shaders):
    walk = walk_of(sink_tokens=16, pairs=32)
    walk.crop_back_and_go_on()


def test_sequences_share_pages_until_one_writes(shaders):
    walk = walk_of(batch=2, pairs=32)
    walk.append(70)
    walk.both("select", [1, 0, 1])
    walk.batch = 3
    numbers = walk.ours._pages.numbers
    assert numbers[0] == numbers[2]
    before = walk.ours.copy()
    for tokens in (1, 12, 1):
        walk.append(tokens)
        walk.check(tokens)
    assert numbers[0][1] != numbers[2][1]  # page 1 was written to
    assert numbers[0][0] == numbers[2][0]
    assert before.length == 70
    assert before._pages.numbers[0] == before._pages.numbers[2]


def test_unpack_gives_the_newest_tokens(shaders):
    walk = walk_of("default", pairs=32)
    walk.append(50)
    want = rooms.unpack_native(walk.theirs, (64, 64), 2, 50, torch.float32)
    for tokens in (50, 45, 20, 1):
        for got, x in zip(walk.ours.unpack(tokens, torch.float32), want, strict=True):
            assert got.shape == (1, 2, tokens, 64)
            assert relative(got, x[:, :, 50 - tokens :]) < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2e4])
def test_values_that_can_not_be_coded_are_refused_before_packing(shaders, bad):
    walk = walk_of()
    walk.append(30)
    layer, before = walk.ours, walk.ours.save()
    k = torch.zeros(1, 2, 5, 64)
    k[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"K holds .* the cache is as before"):
        layer.append(k, torch.zeros_like(k))
    assert all((before[name] == part).all() for name, part in layer.save().items() if hasattr(part, "all"))
    layer.append(k[:, :, 2:3], k[:, :, :1])  # alone it is only kept, until its block is complete
    with pytest.raises(ValueError, match="K holds"):
        layer.append(k[:, :, :2], k[:, :, :2])


def test_a_first_value_that_can_not_be_coded_leaves_nothing(shaders):
    layer, x = GpuLayer(MetalKernels, CPU, **config_of()), torch.zeros(1, 2, 40, 64)
    with pytest.raises(ValueError, match=r"V holds inf among the tokens up to 40"):
        layer.append(x, x + torch.inf)
    assert layer.batch == layer.length == 0
    layer.append(x.repeat(3, 1, 1, 1), x.repeat(3, 1, 1, 1))


def test_what_has_no_kernel_is_refused_by_name(shaders):
    with pytest.raises(NotImplementedError, match="K and V alike, not 32 and 32"):
        GpuLayer(MetalKernels, CPU, **config_of(32))
    with pytest.raises(NotImplementedError, match="K and V alike, not 64 and 128"):
        GpuLayer(MetalKernels, CPU, **config_of(head_dim_v=128))
    with pytest.raises(NotImplementedError, match="4 and 8 bits"):
        GpuLayer(MetalKernels, CPU, **config_of(recipe="passthrough"))


def test_rooms_of_mps_have_metal_kernels_or_say_why_not(monkeypatch):
    device = torch.device("mps")
    if not torch.backends.mps.is_available():
        assert "no Apple GPU" in rooms._gpu_kernels(device, False, config_of())[1]
    monkeypatch.setattr(mps_kernels, "library", lambda: None)
    for exact in (False, True):
        assert rooms._gpu_kernels(device, exact, config_of()) == (MetalKernels, None)
    assert "not 64 and 32" in rooms._gpu_kernels(device, False, config_of(head_dim_v=32))[1]


def test_pages_are_counted_and_copied_on_write():
    pages = MpsPages(2, 8, CPU)
    assert pages.make_room(0, 128)
    assert not pages.make_room(64, 128)
    pool = pages.pool
    pool.bytes[pages.numbers[0][1]] = 7
    pages.select([0, 0], None)
    assert pages.nbytes == 8 * (2 + len(pool.spare))
    other = pages.copy()
    assert pages.make_room(100, 120)
    (a, b), (c, d) = pages.numbers
    assert a == c
    assert len({a, b, d, *other.numbers[0]}) == 4  # two of their own, where the copy still has its one
    assert (pool.bytes[[b, d]] == 7).all()
    del other, pages  # what dies lets go
    assert sorted(pool.spare) == list(range(len(pool.holders)))
    assert (pool.bytes[pool.take(3)] == 0).all()


# --------------------------------------------------------------------------------------------- a model, and the doctor


# The CPU's fast kernels round queries and weights to bytes, unless consistent; the Metal ones compute in float32.
@pytest.mark.parametrize(("prefill", "error"), [("exact", 0.03), ("consistent", 3e-3)])
def test_generate_through_the_stand_in_is_that_of_the_cpu(shaders, monkeypatch, qwen, prefill, error):
    ids = torch.randint(qwen.config.vocab_size, (1, 62), generator=torch.Generator().manual_seed(1))
    qwen.set_attn_implementation("halfbyte")
    caches = [Int4Cache(qwen.config, prefill=prefill) for _ in range(2)]
    logits = []
    for cache in caches:
        out = qwen.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0,
                            output_logits=True, return_dict_in_generate=True)  # fmt: skip
        logits.append(torch.stack(out.logits))
        monkeypatch.undo()  # the second one runs on the CPU
    assert isinstance(caches[0].layers[0].native.kernels, MetalKernels)
    assert isinstance(caches[1].layers[0].native, _native.Layer)
    assert all(layer.native.save()["frequencies"].size == 64 for cache in caches for layer in cache.layers)
    assert relative(logits[0], logits[1]) < error
    assert {name for name, _, _ in shaders.calls} == {"encode_d128_int4", "attend_d128", "finish_d128"}


def test_doctor_checks_and_benches_through_the_stand_in(shaders, tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_MODELS", str(MODELS))
    checks = doctor_mps.check_device(
        CPU, (80,), ("turning-g32", "paper-g32-lambda"), (1, 33), groups=(1, 6, 9), progress=False
    )
    assert [row for row in checks if not row["ok"]] == []
    assert len(checks) == 2 * 3 + 1
    encode = doctor_mps.bench_encode(CPU, vectors=512, repeats=1, progress=False)
    assert [row["paper_m1_ns"] for row in encode if row["paper_m1_ns"]] == [13.0, 13.5, 19.5, 20.1, 22.0, 24.6, 50.0]
    assert all(row["ns_per_vector"] > 0 for row in encode)
    generate = doctor_mps.bench_generate(CPU, "tiny-qwen", (40, 40_000), new_tokens=1, rounds=1, progress=False)
    assert generate[0]["int4_ms_per_token"] > 0
    assert "exceed the 32768 positions" in generate[1]["error"]
    attend = doctor_mps.bench_attend(CPU, tokens=40, repeats=1, calls=1, progress=False)
    assert [row["geometry"] for row in attend] == ["qwen", "gemma", "smollm2", "llama8b"]
    assert all(row["predicted_m1_ns"] < row["predicted_fp16_m1_ns"] for row in attend)
    file = tmp_path / "result.json"
    benches = {"encode": encode, "attend": attend, "generate": generate}
    doctor_mps.write_result(file, doctor_mps.device_facts(), checks, benches)
    document = json.loads(file.read_text())
    assert document["schema"] == doctor_mps.SCHEMA
    assert {row["bench"] for row in document["rows"]} == set(benches)
    assert {"kernels sha256", "chip", "torch"} <= {row["what"] for row in document["device"]}


def test_doctor_sees_a_wrong_kernel(shaders, monkeypatch):
    attend = MetalKernels.attend

    def halved(self, query, out, scale, *rest):
        attend(self, query, out, scale / 2, *rest)

    monkeypatch.setattr(MetalKernels, "attend", halved)
    rows = doctor_mps.check_device(CPU, (64,), ("default",), (33,), groups=(2,), progress=False)
    assert [row["check"] for row in rows if not row["ok"]] == ["d64 default: attention"]


def test_doctor_without_a_gpu_says_so():

    outcome = run("doctor", "--device", "mps")
    assert outcome.exit_code == 2
    assert "PyTorch finds no Apple GPU here" in outcome.stderr


def test_the_workflow_for_macs_parses_and_names_what_exists():
    """It has never run; what can be known here is that its files and options exist."""

    root = Path(__file__).parents[2]
    workflow = yaml.safe_load((root / ".github" / "workflows" / "macos.yml").read_text())
    steps = workflow["jobs"]["metal"]["steps"]
    text = "\n".join(step.get("run", "") for step in steps)
    for file in re.findall(r"tests/python/\w+\.py", text):
        assert (root / file).exists()
    (command,) = re.findall(r"halfbyte doctor .*", text)
    options = run("doctor", "--help").output
    assert all(word in options for word in re.findall(r"--[\w-]+", command))
    assert steps[-1]["with"]["path"] in command
