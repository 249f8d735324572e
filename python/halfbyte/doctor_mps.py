"""`halfbyte doctor --device mps`: every Metal kernel against the CPU's definition, then benches of three kinds.

Meant for owners of Macs: one command whose file holds all there is to know. Not yet run on Apple hardware; the checks
themselves run in the tests, on an emulator of the kernels.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
import subprocess
import time

import numpy as np

from . import _native, metal_model
from .doctor import TAIL_TOKENS, _judge, _relative_error, check_generate
from .recipes import get_recipe
from .results import command_line, memory_bytes, version_of, write_json

SCHEMA = "halfbyte-mps-result/2"
BENCH_VECTORS = 262_144
PAPER_PREFIXES = (256, 1024, 2048, 4096)
RECIPES = ("default", "turning-g32", "g16", "k8v4", "paper-per-token", "paper-g32-lambda")
TURNING = ("default", "turning-g32")  # whose offset of K turns here, by 64 and by 16 tokens; the others' is fixed
CHECKED_TOKENS = (*TAIL_TOKENS, 700)  # several parts of the packed tokens, of several pages each
GROUPS = tuple(range(1, 13))  # query heads a KV head: parts of a tile of 8 rows, a whole one, more than one
ATTENDED_TOKENS = 16_384
# Codes may differ where float32 falls on the other side of a rounding boundary than double: the paper saw 99.997 %.
CODES_EQUAL = 0.999
# The scale search compares sums of squares: where two candidates are within rounding, the whole group takes another.
ROUND_TRIP_TOLERANCE = 0.02
ATTEND_TOLERANCE = 2e-3  # float32 throughout, in other orders than double's


def device_facts() -> list[dict]:
    """Rows {what, value}: chip, GPU cores, system, versions and the text of the kernels."""
    import torch

    from .metal import source

    cores = getattr(torch._C, "_mps_get_core_count", None)
    facts = {
        "chip": _system("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor(),
        "gpu cores": cores() if cores is not None and torch.backends.mps.is_available() else None,
        "memory bytes": memory_bytes(),
        "macOS": platform.mac_ver()[0] or None,
        "python": platform.python_version(),
        "halfbyte": f"{_native.version} ({_native.commit})",
        "kernels sha256": hashlib.sha256(source().encode()).hexdigest()[:16],
    }
    facts |= {name: version_of(name) for name in ("torch", "transformers", "numpy")}
    return [{"what": name, "value": value} for name, value in facts.items()]


def _system(*words):
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        return ""


def _layers(head_dim, recipe_name, device, seed):
    """A layer of the CPU's definition and one of the device, with the same calibration."""
    import torch

    from .gpu_layer import GpuLayer
    from .mps_kernels import MetalKernels

    config = {"kv_heads": 2, "head_dim_k": head_dim, "head_dim_v": head_dim, "dtype": "float32"}
    config["recipe"] = get_recipe(recipe_name)
    pair = _native.Layer(**config), GpuLayer(MetalKernels, torch.device(device), **config)
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.rand(2, head_dim, generator=generator) + 0.5 for _ in "kv"]
    offsets = [torch.randn(2, head_dim, generator=generator) for _ in "kv"]
    for layer in pair:
        if config["recipe"].lambda_:
            layer.set_lambda(*(x.data_ptr() for x in factors))
        if config["recipe"].offset:  # given, so that both code the same differences
            layer.set_offset(*(x.data_ptr() for x in offsets))
        if recipe_name in TURNING:
            _turn(layer, head_dim, bool(seed % 2))
    return pair


def _turn(layer, head_dim, interleaved):
    """Gives a layer the frequencies of RoPE."""
    import torch

    frequencies = 10_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    layer.set_frequencies(frequencies.data_ptr(), head_dim // 2, interleaved)


def _strides(x):
    return x.stride()[:3]


def check_kernels(head_dim, recipe_name, device, tokens=CHECKED_TOKENS, seed=0, groups=GROUPS) -> dict[str, float]:
    """{"packing", "codes that differ", "attention"}: the worst over numbers of tokens, on fresh random input.

    packing: unpacked K and V against the CPU's. codes that differ: the share of their bytes that are not equal.
    attention: of 1 and of 3 queries, with each of so many query heads a KV head, over what the device unpacks, against
    softmax in double.
    """
    import torch

    worst = {"packing": 0.0, "codes that differ": 0.0, "attention": 0.0}
    generator = torch.Generator().manual_seed(seed)
    for count in tokens:
        cpu, layer = _layers(head_dim, recipe_name, device, seed + count)
        shape = 1, 2, count + 3, head_dim
        key, value = (torch.randn(shape, generator=generator) * 3 for _ in "kv")
        for begin, end in ((0, count), (count, count + 3)):
            k, v = key[:, :, begin:end], value[:, :, begin:end]
            cpu.append(k.data_ptr(), v.data_ptr(), 1, end - begin, _strides(k), _strides(v))
            layer.append(k.to(device), v.to(device))
        want = [torch.empty(shape) for _ in "kv"]
        cpu.dequantize(*(x.data_ptr() for x in want))
        got = [x.cpu() for x in layer.unpack(count + 3, torch.float32)]
        for x, y in zip(got, want, strict=True):
            worst["packing"] = max(worst["packing"], _relative_error(x.numpy(), y.numpy()))
        codes = [_codes_of(x.save()["pages"], layer) for x in (layer, cpu)]
        if codes[0].size:
            worst["codes that differ"] = max(worst["codes that differ"], float(np.mean(codes[0] != codes[1])))
        for queries in (1, 3):
            error = _attention_error(layer, got, (key, value), queries, groups, device, generator)
            worst["attention"] = max(worst["attention"], error)
    return worst


def _codes_of(pages, layer):
    """The codes of saved pages, without scales: one a byte, or two."""
    each = layer.kernels.page_head_bytes
    return pages.reshape(-1, each)[:, : 64 * layer.kernels.padded * sum(layer.kernels.bits) // 8]


def _attention_error(layer, unpacked, raw, queries, groups, device, generator):
    """Attention of the newest `queries` of the three tokens added last; the layer must have got them at once."""
    import torch

    if queries != 3:
        layer = layer.copy()
        layer.crop(layer.length - 1)
        new = [x[:, :, -1:] for x in raw]
        layer.append(*(x.to(device) for x in new))
        unpacked = [x.cpu() for x in layer.unpack(layer.length, torch.float32)]
    chunk, worst = [x[:, :, -queries:].to(device) for x in raw], 0.0
    for group in groups:
        query = torch.randn(1, 2 * group, queries, layer.dims[0], generator=generator)
        out = torch.full((1, queries, 2 * group, layer.dims[1]), float("nan"), device=device)
        layer.attend(query.to(device), out, layer.dims[0] ** -0.5, chunk, None, 0.0, None)
        want = [_plain(query[:, :, i], unpacked, raw, layer.length - queries + i) for i in range(queries)]
        worst = max(worst, _relative_error(out.cpu().numpy(), torch.stack(want, dim=1).numpy()))
    return worst


def _plain(query, unpacked, raw, position):
    """Softmax attention in double of the query at `position`: packed values before its own block, raw ones from there.

    query [batch, heads, head_dim]; [batch, heads, head_dim].
    """
    import torch

    own = position // 16 * 16
    key, value = (
        torch.cat([x[:, :, :own], y[:, :, own : position + 1]], 2) for x, y in zip(unpacked, raw, strict=True)
    )
    key, value = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (key @ query.double()[..., None]) * key.shape[3] ** -0.5
    return (scores.softmax(2) * value).sum(2)


def check_device(
    device, head_dims=None, recipes=RECIPES, tokens=CHECKED_TOKENS, groups=GROUPS, seed=0, progress=True
) -> list[dict]:
    """Rows {check, ok, detail, seconds} for every kernel, then for generate."""
    from tqdm import tqdm

    from .metal import HEAD_DIMS

    limits = {"packing": ROUND_TRIP_TOLERANCE, "codes that differ": 1 - CODES_EQUAL, "attention": ATTEND_TOLERANCE}
    cells, rows = [(d, r) for d in head_dims or HEAD_DIMS for r in recipes], []
    for head_dim, recipe in tqdm(cells, desc="kernels", disable=not progress, leave=False):
        found = {}

        def measure(what, head_dim=head_dim, recipe=recipe, found=found):
            if not found:
                found.update(check_kernels(head_dim, recipe, device, tokens, seed, groups))
            return found[what]

        rows += [
            _judge(f"d{head_dim} {recipe}: {what}", lambda w=what, m=measure: m(w), limits[what]) for what in limits
        ]
    rows.append(_judge("generate", lambda: check_generate(device, 64), 0.2))
    return rows


# -------------------------------------------------------------------------------------------------------------- benches


def _synchronize(device):
    import torch

    if torch.device(device).type == "mps":
        torch.mps.synchronize()


def bench_encode(device, vectors=BENCH_VECTORS, repeats=7, progress=True) -> list[dict]:
    """Rows: ns a vector of the paper's seven kinds and of our default recipe, beside paper and prediction for an M1."""
    from tqdm import tqdm

    kinds = [(*kind, ns) for kind, ns in metal_model.PAPER_ENCODE.items()]
    kinds += [(d, 4, 0, None, None) for d in (64, 80, 96, 128, 256)]
    rows = []
    for kind in tqdm(kinds, desc="bench encode", disable=not progress, leave=False):
        head_dim, bits, groups, lambda_, paper = kind
        if lambda_ is None:
            name, recipe = "default", get_recipe("default", sink_tokens=0)
            work = metal_model.encode(head_dim, recipe, 4)
        else:
            group = 0 if groups == 1 else head_dim // groups
            name = "paper g32-lambda" if lambda_ else "paper g32" if group else "paper per-token"
            recipe = get_recipe("paper-g32-lambda" if lambda_ else "paper-g32", k_bits=bits, v_bits=bits, k_group=group,
                                v_group=group)  # fmt: skip
            work = metal_model.paper_encode(head_dim, bits, groups, lambda_)
        seconds = _encode_seconds(recipe, head_dim, device, vectors, repeats)
        rows.append(
            {"head_dim": head_dim, "bits": recipe.k_bits, "recipe": name}
            | {"ns_per_vector": min(seconds) * 1e9 / vectors, "median_ns": statistics.median(seconds) * 1e9 / vectors}
            | {"paper_m1_ns": paper, "predicted_m1_ns": work.ns(metal_model.CHIPS[0])[1], "seconds": seconds}
        )
    return rows


def _encode_seconds(recipe, head_dim, device, vectors, repeats):
    """Seconds to pack `vectors` vectors, half of them K, float32 in; room and pages are there before."""
    import torch

    from .gpu_layer import GpuLayer
    from .mps_kernels import MetalKernels

    heads, tokens = 8, vectors // 16
    config = {"kv_heads": heads, "head_dim_k": head_dim, "head_dim_v": head_dim, "dtype": "float32", "recipe": recipe}
    layer = GpuLayer(MetalKernels, torch.device(device), **config)
    if recipe.lambda_:
        ones = torch.ones(heads, head_dim)
        layer.set_lambda(ones.data_ptr(), ones.data_ptr())
    key = torch.randn(1, heads, tokens, head_dim, device=device)
    layer.append(key, key)
    end, seconds = layer.packed_end, []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        layer.kernels.encode((key, key), 0, 0, end)
        _synchronize(device)
        seconds.append((time.perf_counter() - start) * tokens / max(end, 1))
    return seconds[1:]


def bench_attend(device, tokens=ATTENDED_TOKENS, repeats=7, calls=10, progress=True) -> list[dict]:
    """Rows: ns a token of a KV head, of one query over packed tokens, for each geometry, beside predictions for an M1.

    calls: queued at once. predicted_fp16_m1_ns is what reading fp16 takes at best; see metal_model.
    """
    from tqdm import tqdm

    rows, recipe = [], get_recipe("default")
    for geometry in tqdm(metal_model.GEOMETRIES.values(), desc="bench attend", disable=not progress, leave=False):
        seconds = _attend_seconds(geometry, recipe, device, tokens, repeats, calls)
        ns = [x * 1e9 / (tokens * geometry.kv_heads) for x in seconds]
        works = {"": metal_model.attend(geometry, recipe), "_fp16": metal_model.attend_fp16(geometry)}
        rows.append(
            {"geometry": geometry.name, "tokens": tokens, "ns_per_token": min(ns), "median_ns": statistics.median(ns)}
            | {f"predicted{kind}_m1_ns": work.ns(metal_model.CHIPS[0])[1] for kind, work in works.items()}
            | {"seconds": seconds}
        )
    return rows


def _attend_seconds(geometry, recipe, device, tokens, repeats, calls):
    """Seconds of an attention call, packed tokens and merge, averaged over `calls` of them."""
    import torch

    from .gpu_layer import GpuLayer
    from .mps_kernels import MetalKernels

    heads, d = geometry.kv_heads, geometry.head_dim
    sizes = {"kv_heads": heads, "head_dim_k": d, "head_dim_v": d, "dtype": "float16"}
    layer = GpuLayer(MetalKernels, torch.device(device), **sizes, recipe=recipe)
    _turn(layer, d, False)
    key, query = torch.randn(1, heads, tokens, d), torch.randn(1, geometry.heads, 1, d)
    key, query = (x.to(device, torch.float16) for x in (key, query))
    layer.append(key, key)
    out, seconds = torch.empty(1, 1, geometry.heads, d, dtype=torch.float16, device=device), []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            layer.attend(query, out, d**-0.5, None, None, 0.0, None)
        _synchronize(device)
        seconds.append((time.perf_counter() - start) / calls)
    return seconds[1:]


def bench_generate(
    device, model, prefixes=PAPER_PREFIXES, new_tokens=32, rounds=3, seed=0, progress=True
) -> list[dict]:
    """Rows of bench_generate.generate_row in float16, one a prefix, with the source paper's M1 figures beside them.

    Greedy decoding after a prompt of random tokens, DynamicCache with sdpa and Int4Cache in turn; a prefix that fails
    is a row with the error.
    """
    import torch
    from tqdm import tqdm

    from .bench_generate import check_room, generate_row
    from .models import load_model

    loaded, _ = load_model(model, "float16")
    loaded = loaded.to(device)
    vocabulary = loaded.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (max(prefixes),), generator=torch.Generator().manual_seed(seed)).to(device)
    paper = next((rows for name, rows in metal_model.PAPER_GENERATE.items() if name.lower() in model.lower()), {})
    rows = []
    with torch.inference_mode():
        for prefix in tqdm(prefixes, desc="bench generate", unit="prefix", disable=not progress, leave=False):
            beside = dict(zip(("paper_m1_fp16_ms", "paper_m1_int4_ms"), paper.get(prefix, (None, None)), strict=True))
            try:
                check_room(model, loaded.config, prefix, new_tokens * rounds + 2)
                row = generate_row(model, {"float16": loaded}, prompt[:prefix], new_tokens, rounds)
            except Exception as failure:  # out of memory most likely: the other rows are still worth having
                row = {"model": model, "prefix": prefix, "error": f"{type(failure).__name__}: {failure}"}
            rows.append(row | beside)
    return rows


def write_result(path, facts, checks, benches) -> None:
    """The file to send in, as docs/metal.md describes it. benches: {"encode", "attend", "generate"}: rows."""
    rows = [{"bench": name} | row for name, rows in benches.items() for row in rows]
    write_json(path, rows, command_line(), schema=SCHEMA, device=facts, checks=checks)
