"""Layers for Apple GPUs, on a stand-in for PyTorch's calls that runs the kernels in the emulator.

Not run on Apple hardware. Against the CPU's layers: bytes, attention, every operation of a cache, and generate.
"""

import json
import random
import re
from pathlib import Path

import pytest
import torch
import yaml

from commands import run
from conftest import MODELS
from halfbyte import Int4Cache, _native, doctor_mps, mps_kernels, rooms
from halfbyte.mps_layer import MpsLayer
from halfbyte.mps_pages import PagePool
from halfbyte.recipes import get_recipe
from metal_standin import ShaderLibrary, bound, pretend_mps

CPU = torch.device("cpu")


@pytest.fixture
def shaders(monkeypatch):
    library = ShaderLibrary()
    pretend_mps(monkeypatch, library)
    return library


def strides(x):
    return x.stride()[:3]


class Pair:
    """A layer of the CPU and one of the stand-in, given the same calls."""

    def __init__(self, recipe="default", d=64, dtype="float32", window=0, batch=1, heads=2, seed=0, **fields):
        config = {"kv_heads": heads, "head_dim_k": d, "head_dim_v": d, "dtype": dtype, "sliding_window": window}
        self.recipe = get_recipe(recipe, **fields)
        self.cpu = _native.Layer(**config, recipe=self.recipe)
        self.mps = MpsLayer(CPU, **config, recipe=self.recipe)
        self.config, self.shape, self.dtype = config, (batch, heads), getattr(torch, dtype)
        self.generator = torch.Generator().manual_seed(seed)
        self.chunk = None

    def random(self, heads, tokens, scale=1.0):
        shape = self.shape[0], heads, tokens, self.config["head_dim_k"]
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def append(self, tokens, counted=None, answered=False):
        # Strided as projections give them: [batch, tokens, heads, channels], transposed.
        k, v = (self.random(self.shape[1], tokens, 2.0).transpose(1, 2).contiguous().transpose(1, 2) for _ in "kv")
        address = 0 if counted is None else counted.data_ptr()
        self.cpu.append(k.data_ptr(), v.data_ptr(), self.shape[0], tokens, strides(k), strides(v), address, answered)
        self.mps.append(k, v, counted, answered)
        self.chunk = k, v

    def attend(self, queries=1, group=3, mask=None, softcap=0.0, sinks=None):
        """(CPU, stand-in): outputs of the same queries."""
        query = self.random(group * self.shape[1], queries).transpose(1, 2).contiguous().transpose(1, 2)
        batch, heads, _, d = query.shape
        outs = [torch.full((batch, queries, heads, d), float("nan"), dtype=self.dtype) for _ in range(2)]
        options, (k, v) = {"exact": True, "softcap": softcap}, (x[:, :, -queries:] for x in self.chunk)
        if queries > 1:
            options |= {"chunk_k": k.data_ptr(), "chunk_v": v.data_ptr()}
            options |= {"chunk_k_strides": strides(k), "chunk_v_strides": strides(v)}
        if mask is not None:
            options |= {"mask": mask.data_ptr(), "mask_tokens": mask.shape[3]}
            options |= {"mask_strides": (mask.stride(0), mask.stride(2))}
        if sinks is not None:
            options["sinks"] = sinks.data_ptr()
        self.cpu.attend(
            query.data_ptr(), outs[0].data_ptr(), heads, queries, strides(query), (queries * heads * d, d, heads * d),
            0.125, **options,
        )  # fmt: skip
        self.mps.attend(query, outs[1], 0.125, (k, v), mask, softcap, sinks)
        return outs

    def check(self, queries=1, **options):
        """Outputs agree, and so does what is stored but for the codes that fall to the other side of a tie."""
        want, got = self.attend(queries, **options)
        assert relative(got, want) < tolerance(self.dtype)
        ours, theirs = self.mps.save(), self.cpu.save()
        for name, part in theirs.items():
            if name in ("pages", "offset_k", "offset_v"):
                continue
            assert (part == ours[name]).all() if hasattr(part, "all") else part == ours[name], name
        pages = torch.from_numpy(ours["pages"]), torch.from_numpy(theirs["pages"])
        assert pages[0].numel() == pages[1].numel()
        if pages[0].numel() and self.recipe.scale_bits == 16:  # float32 scales differ in their last bit
            assert (pages[0] != pages[1]).float().mean() < 2e-3
        assert self.mps.visible == self.cpu.visible
        assert self.mps.packed_tokens == self.cpu.packed_tokens


def relative(x, y):
    x, y = x.double(), y.double()
    return float((x - y).pow(2).mean().sqrt() / y.pow(2).mean().sqrt())


def tolerance(dtype):
    """The CPU side computes `exact`, in float32: left are orders of sums, the rounding of outputs, codes at ties."""
    return {torch.float32: 3e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}[dtype]


# ------------------------------------------------------------------------------------------------- numbers and tables


def test_rotation_tables_hold_the_signs_of_the_format():
    for name, d in (("srft", 80), ("srht", 64)):
        recipe = get_recipe("default", rotation=name, seed=7)
        signs = mps_kernels.signs(7, 3, d)
        table = mps_kernels.rotation_table(recipe, 3, d)
        assert torch.equal(table[:d].sign(), signs)
        assert table.numel() == (3 * d if name == "srft" else d)
    # The signs of the worked example in docs/format.md.
    want = [-1, 1, 1, -1, 1, 1, 1, -1, 1, -1, 1, -1, -1, -1, -1, -1]
    assert mps_kernels.signs(0, 0, 16).tolist() == want


def test_page_bytes_are_those_of_a_saved_layer():
    for name in ("default", "g16", "k8v4", "paper-per-token"):
        for d in (64, 80, 128):
            layer = _native.Layer(kv_heads=3, head_dim_k=d, head_dim_v=d, dtype="float32", recipe=get_recipe(name))
            x = torch.randn(1, 3, 65, d)
            layer.append(x.data_ptr(), x.data_ptr(), 1, 65, strides(x), strides(x))
            config = {"kv_heads": 3, "head_dim_k": d, "head_dim_v": d, "dtype": "float32", "recipe": get_recipe(name)}
            kernels = mps_kernels.Kernels(config | {"layer_index": 0}, CPU)
            assert layer.save()["pages"].size == 3 * kernels.page_head_bytes


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
    pair = MpsLayer(CPU, 2, 64, 64, "float32", get_recipe("default"))
    x = torch.randn(1, 2, 40, 64)
    pair.append(x, x)
    pair.attend(torch.randn(1, 2, 1, 64), torch.empty(1, 1, 2, 64), 1.0, None, None, 0.0, None)
    pair.unpack(40, torch.float32)
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


@pytest.mark.parametrize("d", mps_kernels.HEAD_DIMS)
def test_step_by_step_it_is_the_layer_of_the_cpu(shaders, d):
    pair = Pair("default", d, seed=d)
    for tokens, queries in ((37, 1), (1, 1), (3, 3), (9, 9), (1, 1)):
        pair.append(tokens)
        pair.check(queries)


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
    pair = Pair(recipe, 64, dtype, batch=2)
    for tokens, queries in ((7, 1), (19, 19), (1, 1)):
        pair.append(tokens)
        pair.check(queries)


def test_srht_lambda_windows_and_a_given_offset(shaders):
    pair = Pair("default", 128, rotation="srht", lambda_=True, raw_window=16, offset_tokens=32)
    factors = [torch.rand(2, 128) + 0.5 for _ in "kv"]
    mu = torch.randn(2, 128)
    for layer in (pair.cpu, pair.mps):
        layer.set_lambda(*(x.data_ptr() for x in factors))
        layer.set_offset(mu.data_ptr(), 0)
    for tokens, queries in ((20, 1), (20, 20), (25, 25), (1, 1)):
        pair.append(tokens)
        pair.check(queries)
    with pytest.raises(ValueError, match="after tokens were packed"):
        pair.mps.set_lambda(factors[0].data_ptr(), 0)
    dense = Pair("default", 64, rotation="dense")
    matrix = torch.linalg.qr(torch.randn(64, 64))[0].contiguous()
    for layer in (dense.cpu, dense.mps):
        layer.set_rotation(matrix.data_ptr(), matrix.data_ptr())
    dense.append(40)
    dense.check()


def test_mask_softcap_and_sinks(shaders):
    pair = Pair(batch=2)
    pair.append(33)
    pair.append(4)
    mask = (torch.rand(2, 1, 4, 37) > 0.3).index_fill(3, torch.tensor([36]), True)
    pair.check(4, mask=mask)
    pair.check(4, mask=mask[:, :, :, 5:].contiguous(), softcap=5.0, sinks=torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, 0.0]))
    pair.check(1, softcap=5.0)


def test_padding_is_left_out_of_the_offset(shaders):
    pair = Pair(batch=2)
    pair.append(40, torch.cat([torch.zeros(2, 9), torch.ones(2, 31)], dim=1).to(torch.uint8))
    pair.check()
    for name in ("offset_k", "offset_v"):
        ours, theirs = (torch.from_numpy(layer.save()[name]) for layer in (pair.mps, pair.cpu))
        assert relative(ours, theirs) < 1e-5


def test_windows_drop_pages_and_reuse_them(shaders):
    pair = Pair(window=40)
    for tokens in (90, 1, 17, 30, 45, 1):
        pair.append(tokens)
        if tokens < 20:
            pair.check(tokens)
    assert len(pair.mps.pages[0]) <= 3
    assert len(pair.mps.pool.holders) <= 8


def test_a_first_prefill_packs_no_more_than_its_window(shaders):
    pair = Pair(window=40, sink_tokens=16)
    pair.append(200, answered=True)
    assert len(pair.mps.pages[0]) == 1  # tokens 128 to 191: those from 161 on are needed
    assert pair.mps.sinks is None
    for tokens in (1, 3):
        pair.append(tokens)
        pair.check(tokens)


def test_crop_back_and_go_on(shaders):
    pair = Pair(sink_tokens=16)
    for layer in (pair.cpu, pair.mps):
        layer.record_past(True)
    pair.append(45)
    pair.append(30)  # 45 … 74: packs, and may be taken back raw
    for length in (70, 52, 41, 17):
        for layer in (pair.cpu, pair.mps):
            layer.crop(length)
        pair.append(2)
        pair.check(2)
    for layer in (pair.cpu, pair.mps):
        layer.crop(0)
    pair.append(20)
    pair.check()


def test_sequences_share_pages_until_one_writes(shaders):
    pair = Pair(batch=2)
    pair.append(70)
    rows = [1, 0, 1]
    for layer in (pair.cpu, pair.mps):
        layer.select(rows)
    pair.shape = 3, 2
    assert pair.mps.pages[0] == pair.mps.pages[2]
    before = pair.mps.copy()
    for tokens in (1, 12, 1):
        pair.append(tokens)
        pair.check(tokens)
    assert pair.mps.pages[0][1] != pair.mps.pages[2][1]  # page 1 was written to
    assert pair.mps.pages[0][0] == pair.mps.pages[2][0]
    assert before.length == 70
    assert before.pages[0] == before.pages[2]


def test_random_lives(shaders):
    """Any order of operations leaves what the CPU's layer has."""
    chooser = random.Random(3)
    pair = Pair("g32", 64, sink_tokens=16)
    for _ in range(14):
        what = chooser.choice(("append", "append", "append", "crop", "save", "copy"))
        if what == "append" or pair.mps.length == 0:
            pair.append(chooser.choice((1, 1, 2, 15, 17, 40)))
        elif what == "crop":
            length = chooser.randrange(1, pair.mps.length + 1)
            for layer in (pair.cpu, pair.mps):
                layer.crop(length)
            pair.append(1)
        elif what == "save":
            config = pair.config | {"recipe": pair.recipe, "layer_index": 0}
            pair.mps = MpsLayer.load(CPU, pair.mps.save(), **config)
            pair.append(1)
        else:
            pair.mps = pair.mps.copy()
            pair.append(1)
        pair.check(1)


def test_unpack_gives_the_newest_tokens(shaders):
    pair = Pair("default")
    pair.append(50)
    want = [torch.empty(1, 2, 50, 64) for _ in "kv"]
    pair.cpu.dequantize(*(x.data_ptr() for x in want))
    for tokens in (50, 45, 20, 1):
        for got, x in zip(pair.mps.unpack(tokens, torch.float32), want, strict=True):
            assert got.shape == (1, 2, tokens, 64)
            assert relative(got, x[:, :, 50 - tokens :]) < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2e4])
def test_values_that_can_not_be_coded_are_refused_before_packing(shaders, bad):
    pair = Pair()
    pair.append(30)
    before = pair.mps.save()
    k = torch.zeros(1, 2, 5, 64)
    k[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"K holds .* the cache is as before"):
        pair.mps.append(k, torch.zeros_like(k))
    assert all((before[name] == part).all() for name, part in pair.mps.save().items() if hasattr(part, "all"))
    pair.mps.append(k[:, :, 2:3], k[:, :, :1])  # alone it is only kept, until its block is complete
    with pytest.raises(ValueError, match="K holds"):
        pair.mps.append(k[:, :, :2], k[:, :, :2])


def test_what_has_no_kernel_is_refused_by_name(shaders):
    config = {"kv_heads": 1, "dtype": "float32", "recipe": get_recipe("default")}
    with pytest.raises(NotImplementedError, match="K and V alike, not 32 and 32"):
        MpsLayer(CPU, head_dim_k=32, head_dim_v=32, **config)
    with pytest.raises(NotImplementedError, match="K and V alike, not 64 and 128"):
        MpsLayer(CPU, head_dim_k=64, head_dim_v=128, **config)
    with pytest.raises(NotImplementedError, match="4 and 8 bits"):
        MpsLayer(CPU, head_dim_k=64, head_dim_v=64, **config | {"recipe": get_recipe("passthrough")})


def test_rooms_of_mps_are_its_layers_or_say_why_not(monkeypatch):
    config = {"kv_heads": 1, "head_dim_k": 64, "head_dim_v": 64, "dtype": "float32", "recipe": get_recipe("default")}
    if not torch.backends.mps.is_available():
        assert "no Apple GPU" in rooms._gpu_layer(torch.device("mps"), False, None, config)[1]
    monkeypatch.setattr(mps_kernels, "library", lambda: None)
    for exact in (False, True):
        assert rooms._gpu_layer(torch.device("mps"), exact, None, config) == (MpsLayer, None)
    assert "not 64 and 32" in rooms._gpu_layer(torch.device("mps"), False, None, config | {"head_dim_v": 32})[1]


def test_pool_counts_holders_and_copies_on_write():
    pool = PagePool(8, CPU)
    lists = [[], []]
    assert pool.writable(lists, 0, 2)
    assert not pool.writable(lists, 1, 2)
    pool.bytes[lists[0][1]] = 7
    pool.release(lists[1])
    lists[1] = list(lists[0])
    pool.hold(lists[1])
    assert pool.bytes_held(lists) == 8 * (2 + len(pool.spare))
    assert pool.writable(lists, 1, 2)
    assert lists[0][0] == lists[1][0]
    assert lists[0][1] != lists[1][1]
    assert (pool.bytes[lists[0][1]] == 7).all()
    for pages in lists:
        pool.release(pages)
    assert sorted(pool.spare) == list(range(len(pool.holders)))
    assert (pool.bytes[pool.take()] == 0).all()


# --------------------------------------------------------------------------------------------- a model, and the doctor


def test_generate_through_the_stand_in_is_that_of_the_cpu(shaders, monkeypatch, qwen):
    ids = torch.randint(qwen.config.vocab_size, (1, 35), generator=torch.Generator().manual_seed(1))
    qwen.set_attn_implementation("halfbyte")
    caches = [Int4Cache(qwen.config, offset_span=0) for _ in range(2)]  # a fixed offset, as GPU layers have
    logits = []
    for cache in caches:
        out = qwen.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0,
                            output_logits=True, return_dict_in_generate=True)  # fmt: skip
        logits.append(torch.stack(out.logits))
        monkeypatch.undo()  # the second one runs on the CPU
    assert isinstance(caches[0].layers[0].native, MpsLayer)
    assert isinstance(caches[1].layers[0].native, _native.Layer)
    # The CPU's fast kernels round queries and weights to bytes; the Metal ones compute in float32.
    assert relative(logits[0], logits[1]) < 0.03
    assert {name for name, _, _ in shaders.calls} == {"encode_d128_int4", "attend_d128", "finish_d128"}


def test_doctor_checks_and_benches_through_the_stand_in(shaders, tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_MODELS", str(MODELS))
    checks = doctor_mps.check_device(CPU, (80,), ("default", "paper-g32-lambda"), (1, 33), progress=False)
    assert [row for row in checks if not row["ok"]] == []
    assert len(checks) == 2 * 3 + 1
    encode = doctor_mps.bench_encode(CPU, vectors=512, repeats=1, progress=False)
    assert [row["paper_m1_ns"] for row in encode if row["paper_m1_ns"]] == [13.0, 13.5, 19.5, 20.1, 22.0, 24.6, 50.0]
    assert all(row["ns_per_vector"] > 0 for row in encode)
    generate = doctor_mps.bench_generate(CPU, "tiny-qwen", (40, 40_000), new_tokens=1, rounds=1, progress=False)
    assert generate[0]["int4_ms_per_token"] > 0
    assert "exceed the 32768 positions" in generate[1]["error"]
    file = tmp_path / "result.json"
    doctor_mps.write_result(file, doctor_mps.device_facts(), checks, encode, generate)
    document = json.loads(file.read_text())
    assert document["schema"] == doctor_mps.SCHEMA
    assert {"kernels sha256", "chip", "torch"} <= {row["what"] for row in document["device"]}


def test_doctor_sees_a_wrong_kernel(shaders, monkeypatch):
    attend = mps_kernels.Kernels.attend

    def halved(self, layer, query, out, scale, *rest):
        attend(self, layer, query, out, scale / 2, *rest)

    monkeypatch.setattr(mps_kernels.Kernels, "attend", halved)
    rows = doctor_mps.check_device(CPU, (64,), ("default",), (33,), progress=False)
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
