"""Times a decoding step of Int4StaticCache compiled with fullgraph=True against the same step run eagerly."""

import statistics
import sys
import time

import torch

from halfbyte import Int4StaticCache
from halfbyte.models import load_model
from halfbyte.results import machine_facts

ROUNDS, STEPS = 9, 16


@torch.inference_mode()
def compare(name: str, prefix: int) -> tuple[float, float, list[float]]:
    """(eager ms, compiled ms, compiled / eager of each round), medians over rounds taken in turn."""
    model, _ = load_model(name, "float32")
    model.set_attn_implementation("halfbyte")
    prompt = torch.randint(5, 4000, (1, prefix), generator=torch.Generator().manual_seed(0))
    token = prompt[:, -1:]
    step = torch.compile(model.forward, fullgraph=True)
    arms = {}
    for arm, call in (("eager", model.forward), ("compiled", step)):
        cache = Int4StaticCache(model.config, prefix + STEPS * (ROUNDS + 1) + 1)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        call(token, past_key_values=cache)
        arms[arm] = (call, cache)
    times = {arm: [] for arm in arms}
    for i in range(ROUNDS + 1):
        for arm, (call, cache) in arms.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                call(token, past_key_values=cache)
            if i:  # round 0 warms up
                times[arm].append((time.perf_counter() - start) / STEPS * 1e3)
    ratios = [c / e for c, e in zip(times["compiled"], times["eager"], strict=True)]
    return statistics.median(times["eager"]), statistics.median(times["compiled"]), ratios


if __name__ == "__main__":
    print(machine_facts())
    for model in sys.argv[1:] or ("tiny-qwen", "tiny-gemma"):
        for tokens in (256, 4096):
            eager, compiled, ratio = compare(model, tokens)
            spread = f"{min(ratio):.2f} to {max(ratio):.2f}"
            print(f"{model}, prefix {tokens}: eager {eager:.2f} ms, compiled {compiled:.2f} ms, ratio {spread}")
