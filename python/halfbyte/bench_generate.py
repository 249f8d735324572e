"""Times whole decoding steps of a model: a packed cache against the full one."""

from __future__ import annotations

import copy
import statistics
import time

from .bench import SETTLE_S, ratio
from .models import cache_argument
from .recipes import get_recipe


def held_bytes(cache) -> int:
    """Bytes a DynamicCache really holds: whole storages, each once (a sliding layer's view keeps all behind it)."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class DecodeArm:
    """One model and cache after a prefill, ready to decode greedily; both sides of a comparison run this loop."""

    def __init__(self, model, cache, prompt, implementation: str):
        self.model, self.cache, self.implementation = model, cache, implementation
        self.tokens = []
        self.past = cache_argument(model, cache)
        self.last = self._step(prompt[None])

    def _step(self, ids):
        logits = self.model(ids, use_cache=True, logits_to_keep=1, **self.past).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def decode(self, count: int) -> float:
        """Seconds a token over `count` new tokens."""
        start = time.perf_counter()
        for _ in range(count):
            self.tokens.append(self.last)
            self.last = self._step(self.last)
        self.last.tolist()  # waits for the device
        return (time.perf_counter() - start) / count


def make_arm(model, prompt, packed: bool, recipe="default") -> DecodeArm:
    """Prefills prompt [tokens] into an Int4Cache or a DynamicCache; the model is left on that side's attention."""
    from transformers import DynamicCache

    from .hf import Int4Cache

    implementation = "halfbyte" if packed else "sdpa"
    model.set_attn_implementation(implementation)
    cache = Int4Cache(model.config, recipe=recipe) if packed else DynamicCache(config=model.config)
    return DecodeArm(model, cache, prompt, implementation)


def decode_times(arms: dict, new_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a token in each round; a round lets every arm decode new_tokens, one arm after the other."""
    seconds = {name: [] for name in arms}
    for arm_round in range(rounds + 1):
        for name, arm in arms.items():
            arm.model.set_attn_implementation(arm.implementation)
            time.sleep(SETTLE_S)
            took = arm.decode(new_tokens if arm_round else 2)
            if arm_round:  # round 0 warms up
                seconds[name].append(took)
    return seconds


def generate_row(name: str, models: dict, prompt, new_tokens: int, rounds: int, recipe="default") -> dict:
    """One row of bench generate; models: {dtype name: model}.

    {model, dtype, prefix, fp_ms_per_token, int4_ms_per_token, int4_over_fp, int4_over_fp_spread, fp_cache_bytes,
    int4_cache_bytes, rounds}. Each side is timed in every dtype and the one with the lower median counts; when they
    differ, dtype names both. int4_over_fp is the median of the rounds' ratios, its spread their quartiles.
    fp_cache_bytes is the 16-bit cache's when there is one, whichever dtype was quicker.
    """
    arms = {
        (side, dtype): make_arm(model, prompt, side == "int4", recipe)
        for dtype, model in models.items()
        for side in ("fp", "int4")
    }
    seconds = decode_times(arms, new_tokens, rounds)
    best = {side: min(models, key=lambda dtype: statistics.median(seconds[side, dtype])) for side in ("fp", "int4")}
    sixteen_bit = next((dtype for dtype in models if dtype != "float32"), best["fp"])
    same = best["fp"] == best["int4"]
    counted = {side: seconds[side, dtype] for side, dtype in best.items()}
    return {
        "model": name,
        "dtype": best["fp"] if same else f"{best['fp']} / {best['int4']}",
        "prefix": prompt.numel(),
        "fp_ms_per_token": statistics.median(counted["fp"]) * 1e3,
        "int4_ms_per_token": statistics.median(counted["int4"]) * 1e3,
        **ratio(counted, "int4", "fp"),
        "fp_cache_bytes": held_bytes(arms["fp", sixteen_bit].cache),
        "int4_cache_bytes": arms["int4", best["int4"]].cache.nbytes,
        "rounds": {f"{side}_{dtype}_s": times for (side, dtype), times in seconds.items()},
    }


def load_in_dtypes(name: str):
    """({"float32": model, "bfloat16": model}, tokenizer): the dtypes a CPU can be quick in."""
    import torch

    from .models import load_model

    model, tokenizer = load_model(name, "float32")
    half = copy.deepcopy(model)
    for weight in half.parameters():  # not half.to(): RoPE's frequencies stay float32, as when loaded in bfloat16
        weight.data = weight.data.to(torch.bfloat16)
    half.config.dtype = torch.bfloat16
    return {"float32": model, "bfloat16": half}, tokenizer


def check_room(name: str, config, tokens: int, new_tokens: int) -> None:
    """ValueError when a prefix and what follows it exceed the positions a model was made for."""
    room = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is not None and tokens + new_tokens > room:
        raise ValueError(f"prefix: {tokens} and {new_tokens} more tokens exceed the {room} positions of {name!r}")


def bench_generate(
    name: str, prefixes=(256, 1024, 4096), new_tokens=32, rounds=5, recipe="default", seed=0, progress=True
) -> list[dict]:
    """Rows as generate_row gives them, one a prefix.

    Greedy decoding of one sequence after a prompt of random tokens: Int4Cache against DynamicCache with sdpa, each in
    float32 and bfloat16 with the quicker one counting, rounds of new_tokens tokens in turn, medians.
    """
    import torch
    from tqdm import tqdm

    recipe = get_recipe(recipe)
    models, _ = load_in_dtypes(name)
    check_room(name, models["float32"].config, max(prefixes), new_tokens * rounds + 2)
    vocabulary = models["float32"].config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (max(prefixes),), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return [
            generate_row(name, models, prompt[:prefix], new_tokens, rounds, recipe)
            for prefix in tqdm(prefixes, desc="bench generate", unit="prefix", disable=not progress, leave=False)
        ]
