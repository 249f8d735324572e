"""One process of a tensor-parallel run: torchrun starts two, and each saves what it saw to FOLDER/RANK.pt.

Arguments: the models' folder, a file with the inputs, the folder to write to. test_parallel.py reads what is written,
and runs `observe` itself for one process.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from halfbyte import Int4Cache

# One KV head does not divide: the library's own plan fails on tiny-gemma with any cache (k_proj's half of 256 channels
# is no head of 256), so that attention stays whole on every rank and only the MLP is split.
WHOLE_ATTENTION = {f"model.layers.*.self_attn.{name}_proj": "replicate" for name in "qkvo"}
PLANS = {"tiny-qwen": "auto", "tiny-gemma": WHOLE_ATTENTION}


@torch.no_grad()
def observe(model, inputs):
    """{recipe: what the cache and the model gave}, plus what a prompt shorter than a block gave."""
    model.set_attn_implementation("halfbyte")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompt, forced = inputs["prompt"], inputs["forced"]
    seen = {}
    for recipe in ("passthrough", "default"):
        cache = Int4Cache(model.config, recipe=recipe)
        tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=24, do_sample=False)
        seen[recipe] = {"tokens": tokens, **facts(cache)}
        cache = Int4Cache(model.config, recipe=recipe)
        steps = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
        steps += [model(token[None, None], past_key_values=cache).logits for token in forced]
        seen[recipe]["logits"] = torch.cat(steps, dim=1)
    cache = Int4Cache(model.config)
    model(prompt[:, :5], past_key_values=cache)
    model(prompt[:, 5:37], past_key_values=cache)
    seen["short"] = facts(cache)
    return seen


def facts(cache):
    return {
        "kv_heads": [layer.kv_heads for layer in cache.layers],
        "nbytes": cache.nbytes,
        "keys": [layer.keys for layer in cache.layers],
        "values": [layer.values for layer in cache.layers],
    }


def load_split(path, name):
    """The model in float32 with this process's share of the weights."""
    from transformers.distributed import DistributedConfig
    from transformers.utils import is_accelerate_available

    plan = DistributedConfig(tp_plan=PLANS[name])
    if is_accelerate_available():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=plan).eval()
    # from_pretrained refuses a plan without accelerate, though nothing here needs it: split the loaded model by the
    # calls from_pretrained makes, which take no tied weights at this point.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    plan, _, mesh = model.prepare_distribute_model(plan)
    return model.maybe_distribute_model(model, plan, mesh)


def main(models, inputs, folder):
    torch.set_num_threads(1)
    seen = {name: observe(load_split(Path(models) / name, name), torch.load(inputs)) for name in PLANS}
    torch.save(seen, Path(folder) / f"{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
