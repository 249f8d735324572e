"""The tables of arXiv 2605.05699 on models at hand, with its figures beside ours, and an ablation of our own recipe."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from types import SimpleNamespace

import torch

from .calibrate import calibrate
from .codecs import Codec, Linear, Only, Packed, Side, both
from .evaluate import evaluate
from .learn import Plan, learn, learned_recipe
from .models import cache_argument
from .offset import bias_offset
from .recipes import get_recipe
from .simulated import packed, turning

SEEDS = (0, 1, 2)
# Tokens, and the paper's fp16 bytes over its own.
PAPER_BYTES = {256: "3.0 x", 1024: "3.1 x", 4096: ""}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table. paper: what the paper has for it, as it prints it; on: the model it had."""

    name: str
    codec: object
    paper: str = ""
    on: str = ""
    protocol: str = "packed"
    seeds: tuple = (0,)


def _paper_codec(bits: int, group: int, rotation: str) -> Codec:
    return both(Linear(bits, group, False, False, 32), rotation=rotation, offset=0)


def _rotation_lines():
    """Rotation x bits x scaling, symmetric codes without offset."""
    smol = {"identity": "+1.96 ppl", "srht": "+0.34 ppl", "srft": "+0.38 ppl"}
    for bits in (3, 4, 6, 8):
        for rotation in ("identity", "srht", "srft"):
            known = smol[rotation] if bits == 4 else ""
            yield Line(f"{bits} bits, {rotation}, per token", _paper_codec(bits, 0, rotation), known, "SmolLM2-135M")
            yield Line(f"{bits} bits, {rotation}, g32", _paper_codec(bits, 32, rotation))


def _ladder_lines():
    """What Qwen's keys need: from one scale a token to ours."""
    qwen = "Qwen2.5-1.5B"
    alone = get_recipe("paper-per-token", lambda_=True)
    yield Line("per token", get_recipe("paper-per-token"), "+7975 ppl", qwen)
    yield Line("g32", get_recipe("paper-g32"), "+4520 ppl", qwen)
    yield Line("lambda", alone, "about +5400 ppl", qwen)
    yield Line("g32 + lambda", get_recipe("paper-g32-lambda"), "+638.6 ppl", qwen)
    yield Line("g32 + fixed offset", get_recipe("paper-g32", offset=True, offset_span=0))
    yield Line("g32 + turning offset", get_recipe("paper-g32", offset=True))
    yield Line("g32 + turning offset + lambda", get_recipe("paper-g32-lambda", offset=True))
    yield Line("g32 + turning offset + signed scales + search", get_recipe("g32", sink_tokens=0))
    yield Line("the same, first 16 tokens raw: `g32`", get_recipe("g32"))
    yield Line("the same, V one scale a vector: `default`", get_recipe("default"))
    yield Line("8 bits per token", get_recipe("paper-per-token", k_bits=8, v_bits=8), "+0.13 ppl", qwen)


def _hook_lines():
    """The paper's other protocol: what the projections give is packed, before norms and RoPE."""
    gemma = "Gemma-3 1B"
    for name, known in (("paper-per-token", "+18.7 ppl"), ("paper-g32", ""), ("paper-g32-lambda", "+3.6 ppl"),
                        ("default", "")):  # fmt: skip
        yield Line(name, get_recipe(name), known, gemma if known else "", "pre-rope")


def _seed_lines():
    """SRFT and SRHT over seeds of their signs."""
    for rotation in ("srft", "srht"):
        yield Line(f"default, {rotation}", get_recipe("default", rotation=rotation), seeds=SEEDS)


def _ablation_lines():
    """The default with one ingredient taken away, or added, at a time."""
    default = get_recipe("default")
    for name, recipe in (
        ("default", default),
        ("without raw sinks", get_recipe(default, sink_tokens=0)),
        ("without offset", get_recipe(default, offset=False)),
        ("offset fixed", get_recipe(default, offset_span=0)),
        ("offset turning every 16 tokens", get_recipe(default, offset_span=16)),
        ("without rotation", get_recipe(default, rotation="identity")),
        ("without search", get_recipe(default, search=False)),
        ("without signed scales", get_recipe(default, signed_scale=False)),
        ("without groups: K one scale a vector", get_recipe(default, k_group=0)),
        ("V in groups of 32 as well: `g32`", get_recipe("g32")),
        ("with lambda = 1/max", get_recipe(default, lambda_=True)),
    ):
        yield Line(name, recipe, seeds=SEEDS)


TABLES = {
    "rotation": _rotation_lines,
    "ladder": _ladder_lines,
    "hook": _hook_lines,
    "seeds": _seed_lines,
    "ablation": _ablation_lines,
}
ALL_TABLES = (*TABLES, "offsets", "layers", "learned", "memory")


def _offset_lines(model, calib_ids, progress):
    """Where the default's offset comes from: first tokens, a calibration, weights; and one that turns with RoPE."""
    config = model.config.get_text_config(decoder=True)
    for tokens in (16, 64, 256, 2048):
        yield Line(f"fixed, mean of the first {tokens} tokens", Packed(get_recipe("default"), None, tokens))
    if calib_ids is not None:
        for name, recipe in (("fixed", get_recipe("default", offset_span=0)), ("turning", get_recipe("default"))):
            found = calibrate(model, calib_ids, progress=progress, recipe=recipe, offsets=True)
            yield Line(f"{name}, mean over a calibration text", packed(recipe, config, found))
    k, v = Linear(4, 32), Side(Linear(4, 0), offset=0)
    yield Line("fixed, key bias averaged over RoPE; V none", Codec(Side(k, offset=_bias_offsets(model)), v))
    for span in (64, 16, 1):
        yield Line(f"turning, every {span} tokens", Codec(Side(k, offset=turning(config, span)), Side(Linear(4, 0))))


def _bias_offsets(model):
    config = model.config.get_text_config(decoder=True)
    shared, found = SimpleNamespace(rope_means={}), {}
    for module in model.modules():
        if hasattr(module, "k_proj") and hasattr(module, "layer_idx"):
            heads = config.num_key_value_heads
            offset = bias_offset(module, shared, heads, module.head_dim)
            found[module.layer_idx] = torch.zeros(heads, module.head_dim) if offset is None else offset
    return [found[layer] for layer in sorted(found)]


def _layer_lines(model):
    """One side of one layer packed at a time: where the loss comes from."""
    config = model.config.get_text_config(decoder=True)
    whole = packed(get_recipe("default"), config)
    for layer in range(config.num_hidden_layers):
        for which in ("k", "v"):
            yield Line(f"layer {layer} {which.upper()}", Only(whole, layer, which))


def _learned_lines(model, calib_ids, steps, progress):
    """Learned lambda and rotations, on squared error as the paper has it, and on attention's."""
    smol = "SmolLM2-360M"
    yield Line("random signs: `g32`", get_recipe("g32"), "+0.223 ppl", smol), None
    text_offset = "SRFT, Cayley, lambda, attention's loss, and the text's offset"
    for name, plan, known in (
        ("lambda", Plan("lambda", "mse"), "19.5 % -> +0.172 ppl"),
        ("SRFT, Cayley, lambda", Plan("cayley", "mse"), "50.3 % -> +0.153 ppl"),
        ("SRFT, Householder, lambda", Plan("householder", "mse"), "56.2 % -> +0.148 ppl"),
        ("no SRFT, Cayley, lambda", Plan("cayley", "mse", "identity"), "84.9 % -> +0.170 ppl"),
        ("lambda, attention's loss", Plan("lambda"), ""),
        ("SRFT, Cayley, lambda, attention's loss", Plan("cayley"), ""),
        (text_offset, Plan("cayley"), ""),
    ):
        plan = dataclasses.replace(plan, steps=steps)
        found = learn(model, calib_ids, "g32", plan, progress=progress, offsets=name == text_offset)
        cut = statistics.fmean(1 - after / before for before, after in found.learned["losses"].values())
        codec = packed(learned_recipe("g32", plan), model.config.get_text_config(decoder=True), found)
        yield Line(name, codec, known, smol if known else ""), cut


def reproduce(
    model, ids, tables=ALL_TABLES, windows: int = 4, window: int = 2048, calib_ids=None, steps: int = 200, progress=True
) -> list[dict]:
    """Rows of the tables, one after the other, all with the same keys; what does not apply is None.

    {table, line, bits, delta_ppl, kl, kl_sd, top1, error_cut, bytes_ratio, paper, paper_model}. ids, windows, window,
    calib_ids: as for evaluate. error_cut: by how much learning lowered its loss. bytes_ratio: DynamicCache over
    Int4Cache, both of a bfloat16 model, everything counted.
    """
    unknown = [name for name in tables if name not in ALL_TABLES]
    if unknown:
        raise ValueError(f"tables: got {unknown[0]!r}; takes some of {', '.join(ALL_TABLES)}")
    if "learned" in tables and calib_ids is None:
        raise ValueError("calib: the table 'learned' takes a text to learn on, other than the one it is measured on")
    rows = []
    for table in tables:
        if table == "memory":
            rows += _memory_rows(model, ids)
            continue
        if table == "learned":
            pairs = list(_learned_lines(model, calib_ids, steps, progress))
        else:
            of_model = {"layers": _layer_lines, "offsets": lambda m: _offset_lines(m, calib_ids, progress)}
            lines = of_model[table](model) if table in of_model else TABLES[table]()
            pairs = [(line, None) for line in lines]
        rows += _rows(model, ids, table, pairs, windows, window, calib_ids, progress)
    return rows


def _row(table, line, **figures):
    empty = dict.fromkeys(("bits", "delta_ppl", "kl", "kl_sd", "top1", "error_cut", "bytes_ratio"))
    return {"table": table, "line": line.name} | empty | figures | {"paper": line.paper, "paper_model": line.on}


def _rows(model, ids, table, pairs, windows, window, calib_ids, progress):
    protocol, seeds = pairs[0][0].protocol, pairs[0][0].seeds
    codecs = {line.name: line.codec for line, _ in pairs}
    found = evaluate(model, ids, codecs, windows, window, calib_ids, protocol, progress, seeds=seeds)
    kept = ("bits", "delta_ppl", "kl", "kl_sd", "top1")
    return [
        _row(table, line, **{name: row[name] for name in kept if name in row}, error_cut=cut)
        for (line, cut), row in zip(pairs, found, strict=True)
    ]


@torch.inference_mode()
def _memory_rows(model, ids):
    from transformers import DynamicCache

    from .hf import Int4Cache
    from .shared import tensor_bytes
    from .watch import attention_set_to

    model = copy.deepcopy(model).to(torch.bfloat16)  # what stays raw counts as it would in use
    rows = []
    for tokens in PAPER_BYTES:
        text = torch.as_tensor(ids).reshape(1, -1)
        text = text.repeat(1, tokens // text.shape[1] + 1)[:, :tokens]  # bytes do not depend on what it says
        full, packed = DynamicCache(config=model.config), Int4Cache(model.config)
        for cache, attention in ((full, "sdpa"), (packed, "halfbyte")):
            with attention_set_to(model, attention):
                model(text, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
        held = sum(tensor_bytes([layer.keys, layer.values]) for layer in full.layers)
        line = Line(f"{tokens} tokens", None, PAPER_BYTES[tokens], "Qwen2.5-1.5B")
        rows.append(_row("memory", line, bytes_ratio=held / packed.nbytes))
    return rows
