"""Collects per-channel statistics of keys and values from a model: what recipes with lambda need beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch

from .codecs import rotate
from .files import read_safetensors
from .models import cache_argument
from .recipes import Recipe, get_recipe
from .simulated import turning
from .watch import watch_attention

FORMAT = "halfbyte-calibration"
VERSION, OLD_VERSIONS = "2", ("1",)  # of version 1 no offset turns
LAMBDA_CLAMP = 1e-6
# The recipe fields that lambda depends on: a calibration made with others would divide the wrong channels.
RECIPE_FIELDS = ("rotation", "seed", "offset", "offset_span")
PARTS = ("lambda_k", "lambda_v")
OPTIONAL = ("offset_k", "offset_v", "rotation_k", "rotation_v")  # if asked for, and for recipes with a dense rotation


@dataclasses.dataclass
class Calibration:
    """Per layer and KV head, float32 [kv_heads, head_dim]: lambda in the rotated domain, offsets in the original one.

    Offsets, if there are any, take the place of those that a cache finds in its prompt: means of V and, where `turns`,
    of K turned back to position 0 by the middle of each token's span, as docs/format.md has it; else of K as cached.
    Lambda is for what such offsets leave, whether they are kept or not.

    rotation_k, rotation_v: for recipes with rotation="dense", R of each layer, float32 [head_dim, head_dim].
    recipe holds the fields lambda depends on; model is fingerprint(model); text_sha256 is of the token ids.
    """

    lambda_k: list[torch.Tensor] = dataclasses.field(default_factory=list)
    lambda_v: list[torch.Tensor] = dataclasses.field(default_factory=list)
    offset_k: list[torch.Tensor] = dataclasses.field(default_factory=list)
    offset_v: list[torch.Tensor] = dataclasses.field(default_factory=list)
    recipe: dict = dataclasses.field(default_factory=dict)
    model: str = ""
    text_sha256: str = ""
    tokens: int = 0
    seed: int | None = None  # of the sampled text; None when the text was given
    rotation_k: list[torch.Tensor] = dataclasses.field(default_factory=list)
    rotation_v: list[torch.Tensor] = dataclasses.field(default_factory=list)
    learned: dict = dataclasses.field(default_factory=dict)  # how, when lambda or rotations were learned

    @property
    def turns(self) -> bool:
        """Whether offset_k is for turning with RoPE, in layers whose keys do."""
        return bool(self.recipe.get("offset_span"))

    def save(self, path) -> None:
        """Writes one safetensors file: a tensor a layer and part, the rest as metadata."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {
            f"layers.{i}.{part}": tensor.contiguous()
            for part in PARTS + OPTIONAL
            for i, tensor in enumerate(getattr(self, part))
        }
        facts = {
            "recipe": self.recipe,
            "model": self.model,
            "text_sha256": self.text_sha256,
            "tokens": self.tokens,
            "seed": self.seed,
            "learned": self.learned,
        }
        try:
            save_file(tensors, str(path), {"format": FORMAT, "version": VERSION, "facts": json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"path: cannot write {str(path)!r}: {error}") from error

    @classmethod
    def load(cls, path, model=None) -> Calibration:
        """Reads what save wrote; with `model`, also checks that it was made with these weights. ValueError if not."""
        tensors, metadata = read_safetensors(path, "calibration")
        if metadata.get("format") != FORMAT:
            raise ValueError(f"path: {str(path)!r} is a safetensors file but not a {FORMAT} one")
        if metadata.get("version") not in (VERSION, *OLD_VERSIONS):
            raise ValueError(
                f"path: {str(path)!r} has format version {metadata.get('version')!r}; takes "
                + ", ".join(map(repr, (*OLD_VERSIONS, VERSION)))
            )
        try:
            facts = json.loads(metadata["facts"])
            held = PARTS + tuple(part for part in OPTIONAL if f"layers.0.{part}" in tensors)
            layers = range(len(tensors) // len(held))
            parts = {part: [tensors[f"layers.{i}.{part}"] for i in layers] for part in held}
            calibration = cls(**parts, **facts)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: this {FORMAT} file is damaged, {str(path)!r}: {error}") from error
        if model is not None and calibration.model != fingerprint(model):
            raise ValueError(
                f"path: {str(path)!r} was calibrated on another model (fingerprint {calibration.model}, this one has "
                f"{fingerprint(model)})"
            )
        return calibration

    def learned_recipe(self):
        """The recipe that learned lambda and rotations were made for."""
        if not self.learned:
            raise ValueError("calibration: nothing in it was learned; takes one of `halfbyte calibrate --learn`")
        return Recipe(**self.learned["recipe"])

    def check_recipe(self, recipe) -> None:
        """ValueError if lambda is known to be of another rotation, seed or offset than the recipe's."""
        if "rotation" not in self.recipe:  # made by hand, or of a saved cache
            return
        for field, made_with in ({"offset_span": 0} | self.recipe).items():
            if getattr(recipe, field) != made_with and (recipe.offset or field != "offset_span"):
                raise ValueError(
                    f"calibration: was made with {field}={made_with!r}, the recipe has {getattr(recipe, field)!r}"
                )


def fingerprint(model) -> str:
    """16 hex digits of the key and value projections and the geometry: tells models apart that look alike."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if any(part in name for part in ("k_proj", "v_proj", "qkv_proj", "embed_tokens")):
            # float32 of the first rows: the same whatever dtype the checkpoint was loaded in, up to its rounding.
            head = weight.detach().flatten()[:4096].to(torch.bfloat16).view(torch.int16)
            digest.update(f"{name}{tuple(weight.shape)}".encode() + head.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Range:
    """Running minima and maxima of each span of a window, and a sum: all that lambda and the mean need, in one pass."""

    def __init__(self, span: int):
        self.span = span  # tokens that share an offset, 0 for all
        self.low = self.high = None  # [kv_heads, spans, head_dim]
        self.total, self.count = 0.0, 0

    def add(self, rotated, summed):
        """Of one window, both [kv_heads, tokens, head_dim]: R x, and what the mean is taken of."""
        spans = rotated.split(self.span or rotated.shape[1], 1)
        low, high = (torch.stack(part, 1) for part in zip(*((s.amin(1), s.amax(1)) for s in spans), strict=True))
        if self.low is not None:  # a window is never longer than the first
            known = slice(low.shape[1]), slice(low.shape[1], None)
            low = torch.cat([torch.minimum(self.low[:, known[0]], low), self.low[:, known[1]]], 1)
            high = torch.cat([torch.maximum(self.high[:, known[0]], high), self.high[:, known[1]]], 1)
        self.low, self.high = low, high
        self.total = self.total + summed.double().sum(1)
        self.count += summed.shape[1]

    def mean(self):
        return (self.total / self.count).float()

    def lambda_(self, rotated_offsets):
        """1 / max |R x - R mu|, [kv_heads, head_dim]: from the range alone, because R is linear.

        rotated_offsets: R mu of the spans, [kv_heads, spans, head_dim].
        """
        widest = torch.maximum(self.high - rotated_offsets, rotated_offsets - self.low).amax(1)
        return 1.0 / widest.clamp_min(LAMBDA_CLAMP)


@torch.inference_mode()
def calibrate(
    model,
    input_ids,
    window: int = 2048,
    progress: bool = True,
    recipe="paper-g32-lambda",
    seed: int | None = None,
    offsets: bool = False,
) -> Calibration:
    """One forward pass over `input_ids` [tokens] or [rows, tokens], `window` tokens at a time.

    lambda = 1 / max |R (x - mu)| a channel, with mu the mean over the text (0 when the recipe has no offset) and the
    maximum clamped to 1e-6: the deployed lambda of arXiv 2605.05699. K's mean turns with RoPE as the recipe's offset
    does, positions counted from the start of each window. offsets: whether the result gives mu to caches, too; they
    lose less with the mean of their own prompt. seed is only noted in the result.
    """
    recipe = get_recipe(recipe)
    ids = torch.as_tensor(input_ids).reshape(-1)
    if ids.numel() < 16:
        raise ValueError(f"input_ids: got {ids.numel()} tokens; a calibration takes at least 16")
    ranges: dict[tuple[int, str], _Range] = {}
    offset = turning_offset(model, recipe)

    def observe(layer, query, key, value):
        for which, x in (("k", key), ("v", value)):
            raw = x[0].float().cpu()
            turns = offset is not None and which == "k"
            seen = ranges.setdefault((layer, which), _Range(recipe.offset_span if turns else 0))
            seen.add(rotate(raw, recipe, layer), offset.back(raw, layer) if turns else raw)
        return key, value

    from tqdm import tqdm

    with watch_attention(model, observe):
        for start in tqdm(
            range(0, ids.numel(), window), desc="calibrate", unit="window", disable=not progress, leave=False
        ):
            model(ids[None, start : start + window].to(model.device), use_cache=False, logits_to_keep=1)
    return _assemble(model, recipe, ranges, offset, offsets, ids, seed)


def turning_offset(model, recipe):
    """The Turning of a model's keys under a recipe, or None where its offset is fixed."""
    return turning(model.config.get_text_config(decoder=True), recipe.offset_span) if recipe.offset_span else None


def _assemble(model, recipe, ranges, offset, keep, ids, seed) -> Calibration:
    parts = {part: [] for part in PARTS + OPTIONAL}
    for (layer, which), seen in sorted(ranges.items()):
        mean = seen.mean()
        spans = mean[:, None]
        if seen.span:
            spans = offset.forth(mean, layer, seen.low.shape[1] * seen.span)[:, :: seen.span]
        parts[f"lambda_{which}"].append(seen.lambda_(rotate(spans, recipe, layer) * recipe.offset))
        if keep:
            parts[f"offset_{which}"].append(mean)
    return Calibration(
        **parts,
        recipe={name: getattr(recipe, name) for name in RECIPE_FIELDS},
        model=fingerprint(model),
        text_sha256=hash_ids(ids),
        tokens=ids.numel(),
        seed=seed,
    )


def hash_ids(ids: torch.Tensor) -> str:
    """SHA-256 of the token ids as little-endian int64."""
    return hashlib.sha256(ids.long().cpu().numpy().astype("<i8").tobytes()).hexdigest()


@torch.inference_mode()
def sample_text(model, tokens: int, seed: int = 0, progress: bool = True, rows: int = 16) -> torch.Tensor:
    """`tokens` token ids, int64 [tokens], drawn from the model itself at temperature 1.

    `rows` sequences are drawn side by side from the beginning-of-text token and then joined, which is many times
    quicker than one long one. The same seed, dtype and thread count give the same text.
    """
    from tqdm import tqdm
    from transformers import DynamicCache

    if tokens < 1:
        raise ValueError(f"tokens: got {tokens}; takes at least 1")
    length = -(-tokens // rows)
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    step = torch.full((rows, 1), _first_token(model))
    drawn = []
    for _ in tqdm(range(length), desc="sample text", unit="step", disable=not progress, leave=False):
        logits = model(step, use_cache=True, **cache_argument(model, cache)).logits[:, -1].float()
        step = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        drawn.append(step)
    return torch.cat(drawn, dim=1).reshape(-1)[:tokens]


def _first_token(model) -> int:
    config = model.config.get_text_config(decoder=True)
    for token in (config.bos_token_id, config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, (list, tuple)) else token
    return 0
