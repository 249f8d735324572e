"""Recipes of single layers, recipe="auto", and what a cache says about itself."""

import copy
import pickle

import pytest
import torch
from transformers import Cohere2Config

from halfbyte import Int4Cache, Int4StaticCache, Recipe
from halfbyte.auto import bias_sizes
from halfbyte.peers import PEERS
from halfbyte.recipes import FIELDS, RECIPES, get_recipe, layer_recipes
from halfbyte.simulated import SIMULATED, listing

MIXED = {0: "k8v4", -1: {"v_group": 32}}


def fields(recipe):
    return {field: getattr(recipe, field) for field in FIELDS}


def fill(cache, model, ids):
    model.set_attn_implementation("halfbyte")
    with torch.inference_mode():
        return model(ids, past_key_values=cache, use_cache=True).logits


def test_layers_get_their_recipes():
    found = layer_recipes(get_recipe("default"), MIXED, 4)
    assert [(r.k_bits, r.v_group) for r in found] == [(8, 0), (4, 0), (4, 0), (4, 32)]
    for layers, message in (
        ({4: "k8v4"}, "layers: got layer 4; takes -4 to 3"),
        ({"0": "k8v4"}, "layers: got layer '0'"),
        ({1: "none"}, "layers: layer 1: recipe is 'none'"),
        ({1: {"bits": 4}}, "layers: layer 1: 'bits' is no field"),
        (["k8v4"] * 4, "layers: got a list; takes a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_recipes(get_recipe("default"), layers, 4)


def test_a_recipe_is_its_fields():
    recipe = get_recipe("default", k_group=16)
    for same in (get_recipe("default", k_group=16), copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert same == recipe
        assert hash(same) == hash(recipe)
    assert recipe != get_recipe("default") != "default"
    assert eval(repr(recipe), {"Recipe": Recipe}) == recipe
    for wrong in ({"k_bits": "4"}, {"v_group": 32.0}, {"offset": 1}, {"seed": -1}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"recipe: got {name}={value!r}; numbers are ints"):
            get_recipe("default", **wrong)


def test_a_cache_packs_each_layer_by_its_recipe(qwen, text):
    cache, whole = Int4Cache(qwen.config, layers=MIXED), Int4Cache(qwen.config)
    wide, narrow = Int4Cache(qwen.config, "k8v4"), Int4Cache(qwen.config, v_group=32)
    for one in (cache, whole, wide, narrow):
        fill(one, qwen, text[:, :100])
    # Later layers see what earlier ones gave in the first prefill: raw states, the same in all four.
    for layer, like in ((0, wide), (1, whole), (2, whole), (3, narrow)):
        assert torch.equal(cache.layers[layer].keys, like.layers[layer].keys)
        assert torch.equal(cache.layers[layer].values, like.layers[layer].values)
        assert cache.layers[layer].nbytes == like.layers[layer].nbytes
    assert whole.layers[0].nbytes < cache.layers[0].nbytes


@pytest.mark.parametrize("make", [Int4Cache, Int4StaticCache])
def test_layers_of_their_own_survive_saving_copying_and_pickling(make, qwen, text, tmp_path):
    options = {} if make is Int4Cache else {"max_cache_len": 160}
    cache = make(qwen.config, **options, layers=MIXED)
    fill(cache, qwen, text[:, :100])
    cache.save(tmp_path / "cache.safetensors")
    expected = fill(copy.deepcopy(cache), qwen, text[:, 100:120])
    pickled = pickle.dumps(cache)
    for other in (make.load(tmp_path / "cache.safetensors", qwen.config, **options), pickle.loads(pickled)):
        assert [fields(r) for r in other.layer_recipes] == [fields(r) for r in cache.layer_recipes]
        assert torch.equal(fill(other, qwen, text[:, 100:120]), expected)


def test_auto_sees_the_planted_biases_and_says_so(qwen, gemma):
    sizes = bias_sizes(qwen)
    assert len(sizes) == 4
    assert min(sizes[0], sizes[3]) > 2 * max(sizes[1], sizes[2])  # models/README.md: 20 ... 150 against 8 ... 32
    assert bias_sizes(gemma) == [None] * 4
    explained = Int4Cache(qwen.config, "auto", model=qwen).explain().splitlines()
    assert len(explained) == 3
    assert "key biases reach" in explained[2]
    assert "4.31 bits a value" in explained[0]  # what turns takes them off
    assert Int4Cache(gemma.config, "auto", model=gemma).recipe.v_group == 0
    assert "RoPE base 1,000,000" in explained[2]
    for cache, reason in (
        (Int4Cache(gemma.config, "auto", model=gemma), "2 of 4 layers slide, RoPE base 10,000 and 1,000,000"),
        (Int4Cache(gemma.config, "auto", model=gemma), "keys have no bias"),
        (Int4Cache(qwen.config, "auto"), "no model was given"),
        (Int4Cache(qwen.config), "the caller asked"),
    ):
        assert len(cache.explain().splitlines()) == 3
        assert reason in cache.explain()
    assert "the first 16 tokens raw" in Int4Cache(qwen.config).explain().splitlines()[1]
    assert "no tokens raw" in Int4Cache(qwen.config, "no-sinks").explain().splitlines()[1]


def test_auto_pays_for_biases_that_no_offset_follows(qwen):
    config = copy.deepcopy(qwen.config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}  # changes with the length
    explained = Int4Cache(config, "auto", model=qwen).explain()
    assert "4.50 bits a value" in explained
    assert "no offset follows RoPE here" in explained


def test_the_listing_says_what_has_kernels(qwen):
    rows = {row["recipe"]: row for row in listing(128)}
    assert len(rows) == len(RECIPES) + len(SIMULATED) + len(PEERS)
    for name, row in rows.items():
        assert (row["runs"] == "kernels") == (name in RECIPES)
        if row["runs"] != "kernels":
            with pytest.raises(ValueError, match="it takes one that has kernels"):
                Int4Cache(qwen.config, name)
    assert {name: rows[name]["bits"] for name in ("default", "k3v3", "kivi-4-g64")} == {
        "default": 4.3125, "k3v3": 3.5, "kivi-4-g64": 4.5}  # fmt: skip


def test_explain_says_whether_the_offset_turns(qwen, gemma):
    for config, recipe, said in (
        (qwen.config, "default", ", offset turning with RoPE every 64 tokens, "),
        (gemma.config, "turning", ", offset turning with RoPE every 16 tokens, "),
        (qwen.config, "fixed-offset", ", fixed offset, "),
        (qwen.config, "no-offset", ", no offset, "),
        (Cohere2Config(num_hidden_layers=4), "default", "every 64 tokens in 3 of 4 layers, "),
    ):
        assert said in Int4Cache(config, recipe).explain()


def test_explain_counts_bits_by_layer(qwen):
    mean = (4.3125 * 3 + 6.3125) / 4
    assert f"4 of 4 layers are packed, {mean:.2f} bits a value" in Int4Cache(qwen.config, layers={0: "k8v4"}).explain()


def test_auto_leaves_named_layers_and_fields_to_the_caller(qwen):
    cache = Int4Cache(qwen.config, "auto", model=qwen, layers={0: "g16"}, sink_tokens=16)
    assert (cache.layer_recipes[0].k_group, cache.recipe.sink_tokens) == (16, 16)
