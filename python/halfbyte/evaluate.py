"""Measures what a recipe costs a model in quality: perplexity, KL divergence and agreement against the full cache."""

from __future__ import annotations

import dataclasses
import math

import torch

from . import _native
from .calibrate import Calibration, attention_set_to, calibrate, sample_text, watch_attention
from .recipes import get_recipe

CALIBRATION_TOKENS = 8192
PREFILL_TOKENS = 256  # as deployed: the prompt, whose mean becomes the offset; the rest follows in chunks of this size
COMPARE_ROWS = 256  # positions compared at once: a softmax over a large vocabulary is the peak of memory here


@dataclasses.dataclass
class Score:
    """Sums over predicted tokens, in double: negative log-likelihood (nats), KL(reference || other), agreements."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, reference, other, targets) -> None:
        """reference, other: logits [tokens, vocabulary] that predict targets [tokens]."""
        for start in range(0, targets.numel(), COMPARE_ROWS):
            rows = slice(start, start + COMPARE_ROWS)
            ref, log_p = reference[rows].float(), reference[rows].float().log_softmax(-1)
            log_q = other[rows].float().log_softmax(-1)
            self.kl += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
            self.nll -= log_q.gather(1, targets[rows, None]).double().sum().item()
            self.agreed += int((ref.argmax(-1) == other[rows].argmax(-1)).sum())
        self.tokens += targets.numel()

    @property
    def ppl(self) -> float:
        return math.exp(self.nll / self.tokens)


def round_trip(x: torch.Tensor, recipe, which: str, layer: int, offset=None, lambda_=None) -> torch.Tensor:
    """x [kv_heads, tokens, head_dim] packed and unpacked; offset, lambda_: float32 [kv_heads, head_dim] or None."""
    source = x.float().contiguous()
    out = torch.empty_like(source)
    heads, tokens, head_dim = source.shape
    if lambda_ is not None and lambda_.shape != (heads, head_dim):
        raise ValueError(
            f"calibration: layer {layer} has lambda_{which} of shape {list(lambda_.shape)}; this model "
            f"takes {[heads, head_dim]}"
        )
    for head in range(heads):
        mu, lam = (0 if t is None else t[head].data_ptr() for t in (offset, lambda_))
        _native.roundtrip(
            source[head].data_ptr(), out[head].data_ptr(), tokens, head_dim, recipe, which, mu, lam, layer
        )
    return out.to(x.dtype)


def packing_hook(recipe, calibration: Calibration | None, offset_tokens: int):
    """A hook for watch_attention that packs every key and value before it is attended."""

    def pack(layer, which, x):
        lambda_ = getattr(calibration, f"lambda_{which}")[layer] if recipe.lambda_ else None
        rows = []
        for sequence in x:
            mean = sequence[:, :offset_tokens].float().mean(1).contiguous() if recipe.offset else None
            rows.append(round_trip(sequence, recipe, which, layer, mean, lambda_))
        return torch.stack(rows)

    return lambda layer, key, value: (pack(layer, "k", key), pack(layer, "v", value))


def logits_packed(model, ids, recipe, calibration=None, offset_tokens: int = 256) -> torch.Tensor:
    """Logits [tokens, vocabulary] of ids [tokens] with every token packed before it is attended."""
    with watch_attention(model, packing_hook(recipe, calibration, offset_tokens)):
        return model(ids[None], use_cache=False).logits[0]


def logits_deployed(model, ids, recipe, calibration=None, chunk: int = PREFILL_TOKENS) -> torch.Tensor:
    """Logits [tokens, vocabulary] through a real Int4Cache: a prompt of PREFILL_TOKENS, then chunks of `chunk`.

    Chunks give what token by token gives: which tokens a query sees packed depends on positions alone.
    """
    from .hf import Int4Cache

    cache = Int4Cache(model.config, recipe=recipe, calibration=calibration)
    starts = [0, *range(PREFILL_TOKENS, ids.numel(), chunk)]
    with attention_set_to(model, "halfbyte"):
        chunks = [
            model(ids[None, start:end], past_key_values=cache, use_cache=True).logits[0]
            for start, end in zip(starts, [*starts[1:], ids.numel()], strict=True)
        ]
    return torch.cat(chunks)


def calibrations_for(model, recipes: dict, calib_ids, seed: int, progress: bool) -> dict[str, Calibration]:
    """A calibration for each recipe with lambda: from calib_ids, else from text sampled from the model itself."""
    needy = {name: recipe for name, recipe in recipes.items() if recipe is not None and recipe.lambda_}
    if not needy:
        return {}
    sampled = calib_ids is None
    if sampled:
        calib_ids = sample_text(model, CALIBRATION_TOKENS, seed, progress)
    return {
        name: calibrate(model, calib_ids, progress=progress, recipe=recipe, seed=seed if sampled else None)
        for name, recipe in needy.items()
    }


def named_recipes(recipes) -> dict:
    """{name: Recipe}, with None for "fp"; recipes: names, Recipe objects, or a dict of them."""
    if isinstance(recipes, str):
        recipes = [recipes]
    if isinstance(recipes, dict):
        return {name: None if recipe in (None, "fp") else get_recipe(recipe) for name, recipe in recipes.items()}
    named = {}
    for i, recipe in enumerate(recipes):
        if recipe == "fp":
            named["fp"] = None
            continue
        try:
            named[recipe if isinstance(recipe, str) else f"recipe-{i}"] = get_recipe(recipe)
        except ValueError as error:
            raise ValueError(f"{error} (and 'fp', the full cache, here)") from None
    return named


@torch.inference_mode()
def evaluate(
    model,
    ids,
    recipes,
    windows: int = 8,
    window: int = 2048,
    calib_ids=None,
    as_deployed: bool = False,
    progress: bool = True,
    offset_tokens: int = 256,
    seed: int = 0,
) -> list[dict]:
    """Rows {recipe, ppl, delta_ppl, kl, top1}: each recipe against the same model with a full cache.

    ids: token ids [tokens], of which the first windows * window are used, each window on its own. recipes: names,
    Recipe objects or a dict of them; "fp" is the full cache itself. calib_ids: text for recipes with lambda; without
    it the model samples its own with `seed`. Every token is packed before it is attended, its offset being the mean of
    the first `offset_tokens` tokens of the window; as_deployed follows the block rule through Int4Cache instead.
    kl is KL(full || recipe) in nats a predicted token, top1 the share of equal first choices.
    """
    ids = torch.as_tensor(ids).reshape(-1)
    _check_sizes(ids, windows, window)
    recipes = named_recipes(recipes)
    calibrations = calibrations_for(model, recipes, calib_ids, seed, progress)
    scores = {name: Score() for name in recipes}
    full = Score()

    from tqdm import tqdm

    steps = tqdm(total=windows * (1 + len(recipes)), desc="eval", unit="pass", disable=not progress, leave=False)
    for start in range(0, windows * window, window):
        text = ids[start : start + window]
        reference = model(text[None], use_cache=False).logits[0]
        full.add(reference[:-1], reference[:-1], text[1:])
        steps.update()
        for name, recipe in recipes.items():
            if recipe is None:
                other = reference
            elif as_deployed:
                other = logits_deployed(model, text, recipe, calibrations.get(name))
            else:
                other = logits_packed(model, text, recipe, calibrations.get(name), offset_tokens)
            scores[name].add(reference[:-1], other[:-1], text[1:])
            steps.update()
    steps.close()
    return [
        {
            "recipe": name,
            "ppl": score.ppl,
            "delta_ppl": score.ppl - full.ppl,
            "kl": score.kl / score.tokens,
            "top1": score.agreed / score.tokens,
        }
        for name, score in scores.items()
    ]


def _check_sizes(ids, windows: int, window: int) -> None:
    if windows < 1:
        raise ValueError(f"windows: got {windows}; takes at least 1")
    if window < 32:
        raise ValueError(f"window: got {window}; takes at least 32 tokens")
    if ids.numel() < windows * window:
        fitting = ids.numel() // window
        raise ValueError(
            f"text: has {ids.numel()} tokens, {windows} windows of {window} take {windows * window}; "
            f"{fitting} such windows fit"
        )
