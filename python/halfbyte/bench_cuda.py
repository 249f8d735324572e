"""Times attention, packing and decoding on one NVIDIA GPU, beside PyTorch's own and a copy in the same run."""

from __future__ import annotations

import gc
import statistics
import time
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import _cuda
from .bench import Geometry, ratio, uncalibrated
from .models import cache_argument
from .recipes import get_recipe

FLUSH_BYTES = 128 << 20  # over twice the L2 cache of an H100: nothing timed finds its input or its code there
COPY_BYTES = 1 << 30
HOLD_CYCLES = 1_000_000  # some 0.6 ms
REPEATS = 20
ROPE_THETA = 1e4


def check_device():
    """The GPU that is timed. ValueError where there is none that can."""
    reason = "PyTorch finds no CUDA device" if not torch.cuda.is_available() else _cuda.why_not(0)
    if reason:
        raise ValueError(f"backend: cuda can not run here: {reason}")
    return torch.device("cuda:0")


def graph_us(call, rounds=REPEATS) -> list[float]:
    """Microseconds of each replay of `call` as a CUDA graph, with a cold L2 cache."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())  # what `call` reads may still be on its way
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
    # Read, as a model reads weights between two layers; written, it would still be on its way to memory in our time.
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HOLD_CYCLES)  # until all is queued: what a busy processor takes for it is none of ours
        flush.max()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times[1:]


def copy_tb_per_s() -> float:
    """Bytes read and written a second by a large device-to-device copy, in 1e12."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    return 2 * COPY_BYTES / statistics.median(graph_us(lambda: target.copy_(source))) * 1e-6


def _layer(device, geometry: Geometry, recipe, dtype):
    """An empty layer; its offset turns as that of a model with RoPE would, where the recipe lets it."""
    from .cuda_kernels import CudaKernels
    from .gpu_layer import GpuLayer

    _, _, kv_heads, d = geometry
    sizes = {"kv_heads": kv_heads, "head_dim_k": d, "head_dim_v": d}
    layer = GpuLayer(CudaKernels, device, dtype=str(dtype).removeprefix("torch."), recipe=recipe, **sizes)
    if recipe.offset and recipe.offset_span:
        frequencies = ROPE_THETA ** -(torch.arange(0, d, 2) / d)
        layer.set_frequencies(frequencies.data_ptr(), d // 2)
    return layer


def bench_attend(
    geometries, tokens, batch=1, recipes=("default",), rounds=REPEATS, seed=0, progress=False
) -> list[dict]:
    """Rows, one for each geometry, recipe and number of tokens: one new token attends to all, fp16.

    int4_us against PyTorch's flash attention with the query heads of a KV head folded into the query length
    (sdpa_folded_us), and against the library's attention as models call it (sdpa_us). tb_per_s: packed bytes a second;
    of_copy: the same over a copy's bandwidth in this run. distance: of our output to that of fp16, relative.
    """
    from tqdm import tqdm

    device, copy = check_device(), copy_tb_per_s()
    cells = [(g, name, count) for g in geometries for name in recipes for count in tokens]
    return [
        _attend_row(device, g, name, count, batch, copy, rounds, seed)
        for g, name, count in tqdm(cells, "bench attend", disable=not progress, leave=False)
    ]


def _attend_row(device, geometry, recipe, tokens, batch, copy, rounds, seed):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.cuda.empty_cache()  # or the cells before decide in which pieces of memory this one lies, which it can tell
    torch.manual_seed(seed)
    _, heads, kv_heads, d = geometry
    kind = {"device": device, "dtype": torch.float16}
    k, v = (torch.randn(batch, kv_heads, tokens, d, **kind) for _ in range(2))
    query = torch.randn(batch, heads, 1, d, **kind)
    layer = _layer(device, geometry, uncalibrated(recipe, "bench attend"), torch.float16)
    layer.append(k[:, :, :-1], v[:, :, :-1])
    layer.append(k[:, :, -1:], v[:, :, -1:])
    out = torch.full((batch, 1, heads, d), float("nan"), **kind)
    folded = query.view(batch, kv_heads, heads // kv_heads, d)  # K and V are read once for a group
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)

    def flash(*states):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*states)

    arms = {
        "int4": lambda: layer.attend(query, out, d**-0.5, None, None, 0.0, None),
        "sdpa_folded": lambda: flash(folded, k, v),
        "sdpa": lambda: sdpa_attention_forward(module, query, k, v, None, scaling=d**-0.5),
    }
    with torch.inference_mode():
        us = {name: statistics.median(graph_us(call, rounds)) for name, call in arms.items()}
        want = arms["sdpa_folded"]().view(batch, heads, d).float()
    rate = layer._pages.nbytes / us["int4"] * 1e-6
    return {
        "geometry": geometry.name,
        "recipe": recipe,
        "batch": batch,
        "tokens": tokens,
        **{f"{name}_us": value for name, value in us.items()},
        "sdpa_folded_over_int4": us["sdpa_folded"] / us["int4"],
        "tb_per_s": rate,
        "of_copy": rate / copy,
        "copy_tb_per_s": copy,
        "distance": float((out[:, 0].float() - want).norm() / want.norm()),
    }


def bench_encode(head_dim=128, vectors=262144, recipes=("default",), rounds=REPEATS, seed=0) -> list[dict]:
    """Rows {head_dim, dtype, recipe, us, tb_per_s, of_copy}: so many K and as many V vectors packed in one launch."""
    device, copy, rows = check_device(), copy_tb_per_s(), []
    for dtype in (torch.float16, torch.bfloat16):
        for name in recipes:
            for search in (True, False):
                recipe = get_recipe(uncalibrated(name, "bench encode"), search=search)
                us, moved = _encode(device, head_dim, vectors, dtype, recipe, rounds, seed)
                row = {"head_dim": head_dim, "dtype": str(dtype).removeprefix("torch."), "recipe": name}
                row |= {"search": search, "us": us, "tb_per_s": moved / us * 1e-6}
                rows.append(row | {"of_copy": moved / us * 1e-6 / copy, "copy_tb_per_s": copy})
    return rows


def _encode(device, head_dim, vectors, dtype, recipe, rounds, seed):
    """(median microseconds, bytes read and written)"""
    torch.manual_seed(seed)
    tokens = vectors // 2 // 16 * 16
    layer = _layer(device, Geometry("", 2, 2, head_dim), recipe, dtype)
    k, v = (torch.randn(1, 2, tokens + 1, head_dim, device=device, dtype=dtype) for _ in range(2))
    layer.append(k, v)  # fixes the offset and has pages; the same tokens are packed again and again
    us = statistics.median(graph_us(lambda: layer.kernels.encode((k, v), 0, 0, tokens), rounds))
    return us, 2 * k.numel() * k.element_size() + layer._pages.nbytes


# ---------------------------------------------------------------------------------------------------- whole models

QWEN = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
QWEN |= {
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 1 << 17,
    "tie_word_embeddings": True,
}
GEMMA = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
GEMMA |= {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 1 << 15}
GEMMA |= {"sliding_window": 512, "layer_types": [("sliding", "full")[i % 6 == 5] + "_attention" for i in range(26)]}


def random_model(name: str):
    """A model in bfloat16 on the GPU with random weights, in the shape of "qwen2.5-1.5b" or "gemma-3-1b"."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config

    shapes = {"qwen2.5-1.5b": (Qwen2Config, QWEN), "gemma-3-1b": (Gemma3TextConfig, GEMMA)}
    if name not in shapes:
        raise ValueError(
            f"model: got {name!r}; takes {' or '.join(shapes)} with --backend cuda, whose weights are random"
        )
    kind, shape = shapes[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(kind(**shape), dtype=torch.bfloat16).eval()


COMPILED = "static", "int4_static"


def _make_cache(arm, model, room, recipe):
    from transformers import DynamicCache, StaticCache

    from .hf import Int4Cache
    from .static import Int4StaticCache

    config = model.config
    return {
        "dynamic": lambda: DynamicCache(config=config),
        "int4": lambda: Int4Cache(config, recipe),
        "static": lambda: StaticCache(config=config, max_cache_len=room),
        "int4_static": lambda: Int4StaticCache(config, room, recipe),
    }[arm]()


class Arm:
    """One cache after its prefill of `prompt`, ready to decode greedily."""

    def __init__(self, name, model, prompt, room, recipe):
        self.name, self.model = name, model
        self.implementation = "halfbyte" if name.startswith("int4") else "sdpa"
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        model.set_attn_implementation(self.implementation)
        self.cache = _make_cache(name, model, room, recipe)
        self.forward = model.forward
        self.last = self._step(prompt)
        torch.cuda.synchronize()
        self.prefill_ms = (time.perf_counter() - start) * 1e3
        self.peak_bytes = torch.cuda.max_memory_allocated() - before
        if name in COMPILED:
            self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        self.ms_per_token = []

    def _step(self, ids):
        out = self.forward(ids, use_cache=True, logits_to_keep=1, **cache_argument(self.model, self.cache))
        return out.logits[:, -1].argmax(-1, keepdim=True).clone()

    def decode(self):
        """Adds a token, and waits for it as generate() does. Returns its milliseconds."""
        self.model.set_attn_implementation(self.implementation)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.last = self._step(self.last)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


def _decode_round(arms, count):
    """Has every arm decode `count` tokens, in turns of one: a processor's pace changes within a second."""
    taken = [[arm.decode() for arm in arms] for _ in range(count)]
    for arm, ms in zip(arms, zip(*taken, strict=True), strict=True):
        arm.ms_per_token.append(statistics.fmean(ms))


def _held(cache) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def bench_generate(
    name: str,
    prefixes,
    new_tokens=32,
    rounds=3,
    recipe="default",
    batch=1,
    arms=("dynamic", "int4"),
    seed=0,
    progress=True,
) -> list[dict]:
    """Rows {model, batch, prefix, then for each arm its ms_per_token, tokens_per_s, prefill_ms, peak_gb, cache_gb}.

    Greedy decoding after a prompt of random tokens, bfloat16, eager: DynamicCache ("dynamic") and Int4Cache ("int4"),
    without cuDNN's attention, which would plan anew for every length and be slower than flash attention;
    "static" is StaticCache and "int4_static" Int4StaticCache, both with torch.compile(mode="reduce-overhead"), which
    compiles in the first round and whose ratio is to the other. Peak memory counts from before the prefill,
    without the weights, and is that of the prefill. Medians over rounds of new_tokens tokens, the arms taking turns
    token by token.
    """
    from tqdm import tqdm

    check_device()
    recipe, model = get_recipe(recipe), random_model(name)
    generator, rows = torch.Generator().manual_seed(seed), []
    vocabulary = model.config.vocab_size
    with (
        torch.inference_mode(),
        sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    ):
        for arm in ("dynamic", "int4"):  # loads what the first prefill would have to
            Arm(arm, model, torch.zeros(1, 64, dtype=torch.int64, device="cuda"), 128, recipe).decode()
        for prefix in tqdm(prefixes, "bench generate", disable=not progress, leave=False):
            prompt = torch.randint(vocabulary, (batch, prefix), generator=generator).cuda()
            row = {"model": name, "batch": batch, "prefix": prefix}
            torch.compiler.reset()  # each prefix has a capacity of its own
            room = prefix + (rounds + 1) * new_tokens + 2
            running = [Arm(arm, model, prompt, room, recipe) for arm in arms]
            for _ in range(rounds + 1):
                _decode_round(running, new_tokens)
            for arm in running:
                ms = statistics.median(arm.ms_per_token[1:])  # the first round warms up
                row |= {f"{arm.name}_ms_per_token": ms, f"{arm.name}_tokens_per_s": batch / ms * 1e3}
                row |= {f"{arm.name}_prefill_ms": arm.prefill_ms, f"{arm.name}_peak_gb": arm.peak_bytes * 1e-9}
                row |= {f"{arm.name}_cache_gb": _held(arm.cache) * 1e-9}
            seconds = {arm.name: arm.ms_per_token[1:] for arm in running}
            for over, under in (("int4", "dynamic"), ("int4_static", "static")):
                if {over, under} <= set(arms):
                    row |= ratio(seconds, over, under)
            rows.append(row)
    return rows
