"""Measures what a recipe or any codec costs a model in quality: perplexity, KL divergence and agreement."""

from __future__ import annotations

import dataclasses
import math
import statistics

import torch

from .auto import head_size
from .calibrate import Calibration, calibrate, sample_text
from .codecs import OFFSET_TOKENS, Packed
from .models import cache_argument
from .recipes import RECIPES, Recipe, get_recipe, needs_calibration
from .simulated import SIMULATED, packed
from .tasks import GREEDY_PROMPTS, Greedy, Needles
from .watch import BlockRule, attention_set_to, watch_attention, watch_projections

CALIBRATION_TOKENS = 8192
PREFILL_TOKENS = 256  # as deployed: the prompt, whose mean becomes the offset; the rest follows in chunks of this size
COMPARE_ROWS = 256  # positions compared at once: a softmax over a large vocabulary is the peak of memory here
POSITION_BINS = 8
# packed: every token is packed before it is attended. blocks: the cache's block rule, simulated. deployed: a real
# Int4Cache. pre-rope: the projections' outputs are packed, before norms and RoPE, as in arXiv 2605.05699.
PROTOCOLS = ("packed", "blocks", "deployed", "pre-rope")


@dataclasses.dataclass
class Score:
    """Sums over predicted tokens, in double: negative log-likelihood (nats), KL(reference || other), agreements."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    kl_of: list[torch.Tensor] = dataclasses.field(default_factory=list)  # by token, one tensor for each add

    def add(self, reference, other, targets) -> None:
        """reference, other: logits [tokens, vocabulary] that predict targets [tokens]."""
        parts = []
        for start in range(0, targets.numel(), COMPARE_ROWS):
            rows = slice(start, start + COMPARE_ROWS)
            ref, log_p = reference[rows].float(), reference[rows].float().log_softmax(-1)
            log_q = other[rows].float().log_softmax(-1)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
            self.nll -= log_q.gather(1, targets[rows, None]).double().sum().item()
            self.agreed += int((ref.argmax(-1) == other[rows].argmax(-1)).sum())
        self.kl_of.append(torch.cat(parts))
        self.kl += self.kl_of[-1].double().sum().item()
        self.tokens += targets.numel()

    @property
    def ppl(self) -> float:
        return math.exp(self.nll / self.tokens)

    def percentile(self, percent: float) -> float:
        """The KL that `percent` of the tokens stay below."""
        return torch.cat(self.kl_of).quantile(percent / 100).item()

    def by_position(self, bins: int = POSITION_BINS) -> list[float]:
        """Mean KL in equal parts of the window, from its start to its end."""
        return [part.mean().item() for part in torch.stack(self.kl_of).mean(0).tensor_split(bins)]


def packing_hook(codec):
    """A hook for watch_attention that packs every key and value before it is attended."""

    def pack(layer, which, x):
        return torch.stack([codec(sequence, layer, which) for sequence in x])

    return lambda layer, query, key, value: (pack(layer, "k", key), pack(layer, "v", value))


def logits_packed(model, ids, codec, rule: BlockRule | None = None) -> torch.Tensor:
    """Logits [tokens, vocabulary] of ids [tokens], with tokens packed before they are attended: all or by `rule`."""
    with watch_attention(model, packing_hook(codec), rule):
        return model(ids[None], use_cache=False).logits[0]


def logits_pre_rope(model, ids, codec) -> torch.Tensor:
    """Logits [tokens, vocabulary] with what k_proj and v_proj give packed, before norms and RoPE."""

    def pack(layer, which, x):
        return torch.stack([codec(sequence, layer, which) for sequence in x])

    with watch_projections(model, pack):
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
            model(ids[None, start:end], use_cache=True, **cache_argument(model, cache)).logits[0]
            for start, end in zip(starts, [*starts[1:], ids.numel()], strict=True)
        ]
    return torch.cat(chunks)


def runner(model, codec, protocol: str = "packed"):
    """A function from ids [tokens] to logits [tokens, vocabulary] under a protocol; codec None: the full cache."""
    if codec is None:
        return lambda ids: model(ids[None], use_cache=False).logits[0]
    if protocol == "packed":
        return lambda ids: logits_packed(model, ids, codec)
    if protocol == "pre-rope":
        if isinstance(codec, Packed):
            codec = dataclasses.replace(codec, turning=None)  # nothing has turned yet
        return lambda ids: logits_pre_rope(model, ids, codec)
    recipe = getattr(codec, "recipe", Recipe())
    if protocol == "blocks":
        rule = BlockRule(PREFILL_TOKENS, recipe.sink_tokens, recipe.raw_window)
        return lambda ids: logits_packed(model, ids, codec, rule)
    if not isinstance(codec, Packed):
        raise ValueError(f"protocol: 'deployed' takes recipes with kernels, not a {type(codec).__name__}; use 'blocks'")
    return lambda ids: logits_deployed(model, ids, recipe, codec.calibration)


def named_recipes(recipes) -> dict:
    """{name: Recipe, codec or function from a config to one}, with None for "fp".

    recipes: names of recipes, of simulated ones or of peers, Recipe objects, codecs, or a dict of them.
    """
    if not isinstance(recipes, dict):
        recipes = [recipes] if isinstance(recipes, str) else recipes
        recipes = {recipe if isinstance(recipe, str) else f"recipe-{i}": recipe for i, recipe in enumerate(recipes)}
    return {name: _find(recipe) for name, recipe in recipes.items()}


def _find(recipe):
    from .peers import PEERS

    if recipe in (None, "fp"):
        return None
    if isinstance(recipe, str) and recipe in PEERS | SIMULATED:
        return (PEERS | SIMULATED)[recipe]
    if callable(recipe):
        return recipe
    if isinstance(recipe, str) and recipe not in RECIPES:
        raise ValueError(
            f"recipe is {recipe!r}; it takes 'fp', the full cache; with kernels: {', '.join(RECIPES)}; simulated: "
            f"{', '.join(SIMULATED)}; codecs of others, simulated: {', '.join(PEERS)}"
        )
    return get_recipe(recipe)


class _Maker:
    """Codecs of recipes for a seed; calibrates those with lambda, on calib_ids or on text the model samples itself."""

    def __init__(self, model, calib_ids, offset_tokens, seed, progress, given):
        self.model, self.ids, self.offset_tokens, self.progress = model, calib_ids, offset_tokens, progress
        self.given = given
        self.sampled = seed if calib_ids is None else None
        self.seed = seed

    def __call__(self, recipe, seed):
        if recipe is None:
            return None
        if not isinstance(recipe, Recipe):
            if not hasattr(recipe, "bits_per_value"):
                recipe = recipe(self.model.config.get_text_config(decoder=True))
            return recipe.with_seed(seed)
        recipe = get_recipe(recipe, seed=seed)
        config = self.model.config.get_text_config(decoder=True)
        return packed(recipe, config, self._calibration(recipe), self.offset_tokens)

    def _calibration(self, recipe) -> Calibration | None:
        needs = needs_calibration(recipe)
        if self.given is not None:
            if needs:
                self.given.check_recipe(recipe)
            return self.given
        if needs is None:
            return None
        if needs != "lambda":
            raise ValueError(
                f"calibration: got None, takes a halfbyte.calibrate.Calibration as the recipe uses {needs}"
            )
        if self.ids is None:
            self.ids = sample_text(self.model, CALIBRATION_TOKENS, self.seed, self.progress)
        return calibrate(self.model, self.ids, progress=self.progress, recipe=recipe, seed=self.sampled)


@torch.inference_mode()
def evaluate(
    model,
    ids,
    recipes,
    windows: int = 8,
    window: int = 2048,
    calib_ids=None,
    protocol: str = "packed",
    progress: bool = True,
    offset_tokens: int = OFFSET_TOKENS,
    seeds=(0,),
    greedy: int = 0,
    needles: int = 0,
    calibration: Calibration | None = None,
) -> list[dict]:
    """Rows {recipe, bits, ppl, delta_ppl, kl, kl_p99, top1, kl_by_position}: each against the same model in full.

    ids: token ids [tokens], of which the first windows * window are used, each window on its own. recipes: see
    named_recipes; "fp" is the full cache itself. calib_ids: text for recipes with lambda; without it the model samples
    its own with the first seed. protocol: one of PROTOCOLS. The offset is the mean of the first `offset_tokens` tokens
    of a window. kl is KL(full || recipe) in nats a predicted token, kl_p99 what 99 % of the tokens stay below,
    kl_by_position the mean in eighths of the window, top1 the share of equal first choices.

    seeds: of the rotation's signs; with several, figures are means over them and *_sd their standard deviations.
    greedy: tokens to decode from the start of each window; adds greedy_tokens, how many are decoded before the first
    that differs. needles: adds columns of tasks.Needles with so many of them, in windows of `window` tokens.
    calibration: for every recipe; its offsets are used, its lambda and rotations by recipes that take them.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: got {protocol!r}; takes one of {', '.join(PROTOCOLS)}")
    ids = torch.as_tensor(ids).reshape(-1)
    _check_sizes(ids, windows, window)
    recipes, seeds = named_recipes(recipes), list(seeds)
    make = _Maker(model, calib_ids, offset_tokens, seeds[0], progress, calibration)
    codecs = {(name, seed): make(recipe, seed) for name, recipe in recipes.items() for seed in seeds}
    runs = {key: runner(model, codec, protocol) for key, codec in codecs.items()}
    full = runner(model, None)
    texts = list(ids[: windows * window].reshape(windows, window))
    tasks = []
    if greedy:
        tasks.append(Greedy(model, [text[: window - greedy] for text in texts[:GREEDY_PROMPTS]], greedy))
    if needles:
        tasks.append(Needles(model, full, needles, window, seeds[0]))

    from tqdm import tqdm

    scores, reference = {key: Score() for key in runs}, Score()
    steps = tqdm(total=windows * (1 + len(runs)), desc="eval", unit="pass", disable=not progress, leave=False)
    for text in texts:
        logits = full(text)
        reference.add(logits[:-1], logits[:-1], text[1:])
        steps.update()
        for key, run in runs.items():
            other = logits if codecs[key] is None else run(text)
            scores[key].add(logits[:-1], other[:-1], text[1:])
            steps.update()
    steps.close()
    return [
        {"recipe": name, "bits": _bits(codecs[name, seeds[0]], model)}
        | _spread([_figures(scores[name, seed], reference, runs[name, seed], tasks) for seed in seeds])
        for name in recipes
    ]


def _bits(codec, model) -> float:
    head_dim = head_size(model.config.get_text_config(decoder=True))
    return 8.0 * model.dtype.itemsize if codec is None else codec.bits_per_value(head_dim)


def _figures(score: Score, full: Score, run, tasks) -> dict:
    figures = {
        "ppl": score.ppl,
        "delta_ppl": score.ppl - full.ppl,
        "kl": score.kl / score.tokens,
        "kl_p99": score.percentile(99),
        "top1": score.agreed / score.tokens,
    }
    for task in tasks:
        figures |= task.figures(run)
    return figures | {"kl_by_position": score.by_position()}


def _spread(runs: list[dict]) -> dict:
    """Means over seeds, and standard deviations where there are several."""
    row = {}
    for name, value in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(value, list):
            row[name] = [statistics.fmean(column) for column in zip(*values, strict=True)]
            continue
        row[name] = statistics.fmean(values)
        if len(runs) > 1:
            row[f"{name}_sd"] = statistics.stdev(values)
    return row


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
