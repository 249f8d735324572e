"""Checks that an installation works: what this processor has, what was built, and a ten-second self-test."""

from __future__ import annotations

import math
import os
import time

import numpy as np

from . import _cuda, _native
from .models import cache_argument
from .recipes import get_recipe
from .results import cpu_model, usable_cores, version_of

TAIL_TOKENS = (1, 15, 16, 17, 31, 33, 63, 64, 65)  # around the block of 16 and the widest register
HEAD_DIMS = (64, 80, 128, 256)
# Codes differ where a fast backend's float32 falls on the other side of a rounding boundary than double; few do.
ROUND_TRIP_TOLERANCE = 0.02
# Fast backends quantise queries and probabilities to 8 bits: about 1 % of the output.
ATTEND_TOLERANCE = 0.03


def _relative_error(x, y) -> float:
    """RMS of the difference over RMS of y; inf when anything is not finite."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.inf
    return float(np.sqrt(np.mean((x - y) ** 2) / max(np.mean(y**2), 1e-30)))


def _round_trip(x, recipe, which):
    out = np.empty_like(x)
    mu = np.ascontiguousarray(x.mean(0))
    _native.roundtrip(
        x.ctypes.data,
        out.ctypes.data,
        x.shape[0],
        x.shape[1],
        recipe,
        which,
        mu.ctypes.data if recipe.offset else 0,
        0,
        0,
    )
    return out


def _attend(key, value, query, recipe):
    """(output, K, V as unpacked) of one query token over key, value [1, kv_heads, tokens, head_dim]."""
    _, kv_heads, tokens, head_dim = key.shape
    layer = _native.Layer(kv_heads=kv_heads, head_dim_k=head_dim, head_dim_v=head_dim, dtype="float32", recipe=recipe)
    strides = (kv_heads * tokens * head_dim, tokens * head_dim, head_dim)
    if recipe.offset and recipe.offset_span:
        frequencies = (1e4 ** (-np.arange(head_dim // 2) * 2 / head_dim)).astype(np.float32)
        layer.set_frequencies(frequencies.ctypes.data, frequencies.size)
    layer.append(key.ctypes.data, value.ctypes.data, 1, tokens, strides, strides)
    out, heads = np.empty_like(query), query.shape[1]
    row = (heads * head_dim, head_dim, head_dim)
    layer.attend(query.ctypes.data, out.ctypes.data, heads, 1, row, row, head_dim**-0.5)
    unpacked = np.empty_like(key), np.empty_like(value)
    layer.dequantize(unpacked[0].ctypes.data, unpacked[1].ctypes.data)
    return out, *unpacked


def _plain_attention(key, value, query):
    """Softmax attention in double, the definition itself: every backend is held against it."""
    group = query.shape[1] // key.shape[1]
    key, value = (np.repeat(x, group, axis=1).astype(np.float64) for x in (key, value))
    scores = np.einsum("bhqd,bhtd->bhqt", query.astype(np.float64), key) * key.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqt,bhtd->bhqd", weights / weights.sum(-1, keepdims=True), value)


def make_cases(seed: int) -> list[tuple]:
    """Random (K, V, query, recipe, K and V through the reference backend) at tail sizes; leaves that backend set."""
    generator = np.random.default_rng(seed)
    _native.set_backend("reference")
    cases = []
    for head_dim in HEAD_DIMS:
        bias = 10 * generator.standard_normal(head_dim)
        for tokens in TAIL_TOKENS:
            key = (generator.standard_normal((1, 2, tokens, head_dim)) + bias).astype(np.float32)
            value = generator.standard_normal((1, 2, tokens, head_dim)).astype(np.float32)
            query = generator.standard_normal((1, 6, 1, head_dim)).astype(np.float32)
            recipe = get_recipe("default" if tokens % 2 else "k8v4")
            expected = [_round_trip(x[0, 0], recipe, which) for x, which in ((key, "k"), (value, "v"))]
            cases.append((key, value, query, recipe, expected))
    return cases


def check_backend(name: str, cases: list[tuple]) -> tuple[float, float]:
    """(worst round-trip error against the reference backend, worst attention error against plain softmax)."""
    packing = attending = 0.0
    _native.set_backend(name)
    for key, value, query, recipe, expected in cases:
        for x, which, reference in ((key, "k", expected[0]), (value, "v", expected[1])):
            packing = max(packing, _relative_error(_round_trip(x[0, 0], recipe, which), reference))
        out, *unpacked = _attend(key, value, query, recipe)
        attending = max(attending, _relative_error(out, _plain_attention(*unpacked, query)))
    return packing, attending


def check_generate(device="cpu", head_dim=32) -> float:
    """Greedy generation by a small random model with an Int4Cache: relative error of its last logits."""
    import torch
    from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

    from .hf import Int4Cache

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
        )
    ).eval()
    model, ids = model.to(device), torch.randint(128, (1, 100)).to(device)
    logits = []
    for implementation, cache in (("sdpa", DynamicCache(config=model.config)), ("halfbyte", Int4Cache(model.config))):
        model.set_attn_implementation(implementation)
        generated = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **cache_argument(model, cache)
        )
        if generated.shape != (1, 108):
            raise RuntimeError(f"generate gave {list(generated.shape)} tokens, not [1, 108]")
        with torch.inference_mode():
            logits.append(model(ids[:, :1], **cache_argument(model, cache)).logits[0, -1].cpu().numpy())
    return _relative_error(logits[1], logits[0])


def check_cuda() -> float:
    """Attention on the GPU against plain softmax over what it packed there, at tail sizes: the worst error."""
    import torch

    from .cuda_kernels import CudaKernels
    from .gpu_layer import GpuLayer

    config = {"kv_heads": 2, "head_dim_k": 128, "head_dim_v": 128, "dtype": "float16", "recipe": get_recipe("default")}
    worst = 0.0
    for tokens in TAIL_TOKENS:
        key, value = torch.randn(2, 1, 2, tokens, 128, dtype=torch.float16, device="cuda")
        query = torch.randn(1, 6, 1, 128, dtype=torch.float16, device="cuda")
        layer = GpuLayer(CudaKernels, key.device, **config)
        layer.append(key, value)
        out = torch.full((1, 1, 6, 128), math.nan, dtype=torch.float16, device="cuda")
        layer.attend(query, out, 128**-0.5, None, None, 0.0, None)
        key, value, query = (x.float().cpu().numpy() for x in (*layer.unpack(tokens, torch.float32), query))
        expected = _plain_attention(key, value, query)
        worst = max(worst, _relative_error(out.transpose(1, 2).float().cpu().numpy(), expected))
    return worst


def installation() -> list[dict]:
    """Rows {what, value}: processor, backends, threads and versions."""
    built = _native.backends()
    facts = {
        "processor": cpu_model(),
        "cores usable": usable_cores(),
        "features": " ".join(_native.cpu_features()),
        "backends built": " ".join(name for name, _ in built),
        "backends usable": " ".join(name for name, usable in built if usable),
        "backend in use": _native.backend() + (" (HALFBYTE_BACKEND)" if os.environ.get("HALFBYTE_BACKEND") else ""),
        "threads": _native.num_threads(),
        "halfbyte": f"{_native.version} ({_native.commit})",
        **_cuda.installation(),
    }
    facts |= {name: version_of(name) or "not installed" for name in ("torch", "transformers", "numpy")}
    return [{"what": name, "value": str(value)} for name, value in facts.items()]


def _judge(check: str, measure, tolerance: float) -> dict:
    start = time.perf_counter()
    try:
        error = measure()
        ok, detail = error <= tolerance, f"error {error:.2g}, at most {tolerance} allowed"
    except Exception as failure:  # a broken installation may fail in any way; the report must still come out
        ok, detail = False, f"{type(failure).__name__}: {failure}"
    return {"check": check, "ok": ok, "detail": detail, "seconds": round(time.perf_counter() - start, 2)}


def self_test(seed: int = 0, progress: bool = True) -> list[dict]:
    """Rows {check, ok, detail, seconds}: every usable backend on fresh random input, then generation."""
    from tqdm import tqdm

    chosen, rows = _native.backend(), []
    try:
        cases = make_cases(seed)
        usable = [name for name, usable in _native.backends() if usable]
        for name in tqdm(usable, desc="self-test", unit="backend", disable=not progress, leave=False):
            errors = []

            def measure(at, name=name, errors=errors):
                if not errors:
                    errors.extend(check_backend(name, cases))
                return errors[at]

            rows.append(_judge(f"{name}: packing", lambda m=measure: m(0), ROUND_TRIP_TOLERANCE))
            rows.append(_judge(f"{name}: attention", lambda m=measure: m(1), ATTEND_TOLERANCE))
    finally:
        _native.set_backend(chosen)
    if _cuda.installation().get("CUDA device 0") == "usable" and version_of("torch"):
        rows.append(_judge("cuda: attention", check_cuda, ATTEND_TOLERANCE))
    if version_of("torch") and version_of("transformers"):
        rows.append(_judge("generate", check_generate, 0.2))
    return rows
