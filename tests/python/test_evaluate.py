"""Quality measurement: the measures against their formulas, and recipes against each other on a trained model."""

import math

import pytest
import torch

from halfbyte.codecs import Codec, Linear, Side, both, round_trip
from halfbyte.evaluate import PROTOCOLS, Score, evaluate, logits_deployed, logits_packed, logits_pre_rope
from halfbyte.peers import PEERS
from halfbyte.recipes import RECIPES, get_recipe
from halfbyte.simulated import SIMULATED, packed, turning
from halfbyte.watch import watch_attention


def default_of(model):
    return packed(get_recipe("default"), model.config)


def test_score_is_perplexity_kl_and_agreement():
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log() + 3.0  # logits are free up to a constant
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]).log()
    score = Score()
    score.add(reference, other, torch.tensor([0, 2]))
    kl = 0.5 * math.log(2) - 0.25 * math.log(2) + 0.4 * math.log(2) + 0.6 * math.log(0.75)
    assert score.kl == pytest.approx(kl, rel=1e-5)
    assert score.ppl == pytest.approx(1 / math.sqrt(0.25 * 0.8), rel=1e-5)
    assert (score.agreed, score.tokens) == (1, 2)
    by_token = [0.25 * math.log(2), 0.4 * math.log(2) + 0.6 * math.log(0.75)]
    assert score.by_position(2) == pytest.approx(by_token, rel=1e-5)
    assert score.percentile(100) == pytest.approx(max(by_token), rel=1e-5)
    assert score.percentile(50) == pytest.approx(sum(by_token) / 2, rel=1e-5)


def test_long_texts_are_scored_in_parts_that_add_up():
    generator = torch.Generator().manual_seed(0)
    reference, other = torch.randn(700, 50, generator=generator), torch.randn(700, 50, generator=generator)
    targets = torch.randint(50, (700,), generator=generator)
    score = Score()
    score.add(reference, other, targets)
    expected = torch.nn.functional.kl_div(other.log_softmax(-1), reference.log_softmax(-1), log_target=True,
                                          reduction="sum")  # fmt: skip
    assert score.kl == pytest.approx(expected.item(), rel=1e-4)
    assert score.nll == pytest.approx(torch.nn.functional.cross_entropy(other, targets).item() * 700, rel=1e-5)


def test_watching_changes_nothing_by_itself(model, text):
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        plain = model(text, use_cache=False).logits
        with watch_attention(model, lambda layer, query, key, value: (key, value)):
            assert torch.equal(model(text, use_cache=False).logits, plain)


def test_round_trip_is_close_and_uses_the_offset_with_its_sign():
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    far = x + 100 * torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1))
    mean = far.mean(1).contiguous()
    recipe = get_recipe("default")

    def error(packed, exact):
        return ((packed - exact).norm() / x.norm()).item()

    assert error(round_trip(x, recipe, "k", 0), x) < 0.15
    assert error(round_trip(far, recipe, "k", 0, mean), far) < 0.15
    assert error(round_trip(far, recipe, "k", 0, -mean), far) > 1
    assert error(round_trip(x, get_recipe("k8v4"), "k", 0), x) < 0.02


def test_round_trip_divides_lambda_out_again():
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    lambda_ = torch.rand(1, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    recipe = get_recipe("paper-g32-lambda")
    assert ((round_trip(x, recipe, "v", 0, None, lambda_) - x).norm() / x.norm()).item() < 0.2
    with pytest.raises(ValueError, match="lambda_v of shape"):
        round_trip(x, recipe, "v", 0, None, lambda_[:, :32])


def test_the_full_cache_costs_nothing_and_the_ladder_has_its_order(qwen, text):
    names = ["fp", "paper-per-token", "default", "k8v4"]
    rows = {row["recipe"]: row for row in evaluate(qwen, text[0], names, 1, 512, progress=False)}
    assert list(rows) == names
    full = rows["fp"]
    assert (full["delta_ppl"], full["kl"], full["top1"]) == (0.0, 0.0, 1.0)
    assert rows["default"]["ppl"] == pytest.approx(full["ppl"] + rows["default"]["delta_ppl"])
    assert 0 < rows["k8v4"]["kl"] < rows["default"]["kl"] < 0.03
    assert rows["paper-per-token"]["kl"] > 0.3
    assert rows["paper-per-token"]["delta_ppl"] > 10 * abs(rows["default"]["delta_ppl"])
    assert rows["paper-per-token"]["top1"] < 0.7 < 0.85 < rows["default"]["top1"]


def test_lambda_from_sampled_text_helps_the_paper_recipe(qwen, text, monkeypatch):
    monkeypatch.setattr("halfbyte.evaluate.CALIBRATION_TOKENS", 1024)
    rows = evaluate(qwen, text[0], ["paper-g32", "paper-g32-lambda"], 1, 256, progress=False)
    assert rows[1]["kl"] < 0.8 * rows[0]["kl"]
    given = evaluate(qwen, text[0], ["paper-g32-lambda"], 1, 256, calib_ids=text[0, 256:], progress=False)
    assert given[0]["kl"] < 0.8 * rows[0]["kl"]
    assert given[0]["kl"] != rows[1]["kl"]


def test_sliding_layers_are_packed_too(gemma, text):
    rows = evaluate(gemma, text[0], ["default", "paper-per-token"], 1, 512, progress=False)
    assert 0 < rows[0]["kl"] < 0.02
    assert rows[1]["kl"] > rows[0]["kl"]


def test_as_deployed_is_exact_on_the_prompt_and_close_after_it(model, text):
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        plain = model(text, use_cache=False).logits[0]
        deployed = logits_deployed(model, text[0], get_recipe("default"))
        packed = logits_packed(model, text[0], default_of(model))
    torch.testing.assert_close(deployed[:256], plain[:256], rtol=1e-3, atol=1e-3)
    after, spread = slice(256, None), plain[256:].std()
    assert 0.005 * spread < (deployed[after] - plain[after]).std() < 0.2 * spread
    assert (deployed[after] - packed[after]).abs().max() > 0  # the unfinished block stays raw here only
    assert model.config._attn_implementation == "sdpa"


def test_as_deployed_is_the_same_in_any_chunks(model, text):
    with torch.inference_mode():
        one, seven, many = (
            logits_deployed(model, text[0, :330], get_recipe("default"), chunk=chunk) for chunk in (1, 7, 64)
        )
    # Block rule: the same codes are read; only the order of float sums and the 8-bit queries of a chunk may differ.
    assert (seven - one).norm() < 0.02 * one.norm()
    assert (many - one).norm() < 0.02 * one.norm()


def test_the_simulated_block_rule_gives_what_the_cache_gives(model, text):
    rows = {
        protocol: evaluate(model, text[0], ["default"], 1, 640, protocol=protocol, progress=False)[0]
        for protocol in ("packed", "blocks", "deployed")
    }
    # The cache rounds queries and weights to 8 bits as well; nothing else differs.
    for figure in ("kl", "kl_p99"):
        assert rows["blocks"][figure] == pytest.approx(rows["deployed"][figure], rel=0.15)
    assert rows["blocks"]["top1"] == pytest.approx(rows["deployed"]["top1"], abs=0.02)
    assert rows["blocks"]["kl"] < 0.6 * rows["packed"]["kl"]
    assert rows["deployed"]["kl_by_position"][:3] == pytest.approx([0, 0, 0], abs=1e-6)  # inside the first prefill


def test_a_simulated_codec_is_the_recipe_it_spells_out(model, text):
    def spelled(config):
        return Codec(Side(Linear(4, 32), offset=turning(config, 64)), Side(Linear(4, 0)))

    one, other = evaluate(model, text[0], {"own": "no-sinks", "spelled": spelled}, 1, 256, progress=False)
    assert one["kl"] == pytest.approx(other["kl"], rel=0.02)  # codes on a tie may differ
    assert one["bits"] == other["bits"] == (4.25 + 4 + 16 / model.config.head_dim) / 2 + 0.125


def test_the_ladder_of_the_offset(qwen, text):
    """None, fixed, turning with RoPE every page, block, and token: on a model with key biases each step tells."""
    names = ["no-offset", "fixed-offset", "default", "turning", "turning-token", "table", "turning-table"]
    rows = evaluate(qwen, text[0], names, 1, 640, seeds=(0, 1), progress=False)
    kl = {row["recipe"]: row["kl"] for row in rows}
    assert kl["fixed-offset"] < 0.1 * kl["no-offset"]
    assert kl["default"] < 0.8 * kl["fixed-offset"]
    assert kl["turning"] < kl["default"]
    assert kl["turning-token"] < kl["turning"]
    assert kl["table"] < kl["default"] < 0.0045
    assert kl["turning-table"] < kl["default"]


def test_sinks_and_a_raw_window_lower_the_loss(qwen, text):
    recipes = {"plain": "no-sinks", "kept": get_recipe("default", raw_window=128)}
    rows = evaluate(qwen, text[0], recipes, 1, 512, protocol="blocks", progress=False)
    assert rows[1]["kl"] < 0.8 * rows[0]["kl"]
    deployed = evaluate(qwen, text[0], recipes, 1, 512, protocol="deployed", progress=False)
    assert rows[1]["kl"] == pytest.approx(deployed[1]["kl"], rel=0.15)


def test_before_rope_the_projections_are_packed(qwen, text):
    with torch.inference_mode():
        qwen.set_attn_implementation("sdpa")
        plain = qwen(text, use_cache=False).logits[0]
        assert torch.equal(logits_pre_rope(qwen, text[0], lambda x, layer, which: x), plain)
        seen = set()

        def doubling(x, layer, which):
            seen.add((layer, which, x.shape))
            return 2 * x if which == "v" else x

        assert (logits_pre_rope(qwen, text[0], doubling) - plain).abs().max() > 1
        assert seen == {(layer, which, (2, 640, 128)) for layer in range(4) for which in "kv"}
    rows = evaluate(qwen, text[0], ["default", "paper-per-token"], 1, 256, protocol="pre-rope", progress=False)
    assert rows[0]["kl"] < 0.05 * rows[1]["kl"]


def test_seeds_give_a_mean_and_a_deviation(qwen, text):
    row = evaluate(qwen, text[0], ["default"], 1, 256, seeds=(0, 1, 2), progress=False)[0]
    each = [evaluate(qwen, text[0], ["default"], 1, 256, seeds=(s,), progress=False)[0]["kl"] for s in range(3)]
    assert row["kl"] == pytest.approx(sum(each) / 3)
    assert row["kl_sd"] == pytest.approx(torch.tensor(each, dtype=torch.float64).std().item())
    assert row["kl_sd"] > 0


def test_tasks_tell_a_good_codec_from_a_bad_one(qwen, text):
    recipes = {"full": "fp", "good": get_recipe("default", k_bits=8, v_bits=8), "bad": "paper-per-token"}
    rows = evaluate(qwen, text[0], recipes, 1, 256, greedy=24, needles=2, progress=False)
    full, good, bad = rows
    assert (full["greedy_tokens"], full["needle_agree"], full["needle_kl"]) == (24, 1, 0)
    assert bad["greedy_tokens"] < good["greedy_tokens"]
    assert bad["needle_kl"] > 5 * good["needle_kl"]
    assert full["needle"] == full["needle_full"]


def test_greedy_divergence_is_where_generation_differs(qwen, text):
    from transformers import DynamicCache

    from halfbyte import Int4Cache
    from halfbyte.tasks import Greedy
    from halfbyte.watch import attention_set_to

    recipe, prompt = get_recipe("paper-g32"), text[0, :40]
    with torch.inference_mode():
        with attention_set_to(qwen, "sdpa"):
            greedy = Greedy(qwen, [prompt], 60)
            full = qwen.generate(prompt[None], max_new_tokens=60, do_sample=False,
                                 past_key_values=DynamicCache(config=qwen.config))  # fmt: skip
        assert torch.equal(full[0], greedy.texts[0])
        with attention_set_to(qwen, "halfbyte"):
            packed = qwen.generate(prompt[None], max_new_tokens=60, do_sample=False,
                                   past_key_values=Int4Cache(qwen.config, recipe))  # fmt: skip

        def run(ids):
            with attention_set_to(qwen, "halfbyte"):
                cache = Int4Cache(qwen.config, recipe)
                parts = [ids[:40], *ids[40:, None]]
                return torch.cat([qwen(p[None], past_key_values=cache, use_cache=True).logits[0] for p in parts])

        same = (full[0, 40:] == packed[0, 40:]).long().cumprod(0).sum().item()
        assert greedy.figures(run)["greedy_tokens"] == same < 60


def test_evaluation_repeats_itself(qwen, text):
    runs = [evaluate(qwen, text[0], ["default"], 1, 128, progress=False) for _ in range(2)]
    assert runs[0] == runs[1]


def test_bad_input_is_named(qwen, text):
    with pytest.raises(ValueError, match=r"640 tokens, 3 windows of 256 take 768; 2 such windows fit"):
        evaluate(qwen, text[0], ["default"], 3, 256)
    with pytest.raises(ValueError, match="windows: got 0"):
        evaluate(qwen, text[0], ["default"], 0, 256)
    with pytest.raises(ValueError, match="window: got 8"):
        evaluate(qwen, text[0], ["default"], 1, 8)
    with pytest.raises(ValueError, match="'none'") as raised:
        evaluate(qwen, text[0], ["none"], 1, 256)
    assert all(name in str(raised.value) for name in [*RECIPES, *SIMULATED, *PEERS, "fp"])
    with pytest.raises(ValueError, match=f"protocol: got 'x'; takes one of {', '.join(PROTOCOLS)}"):
        evaluate(qwen, text[0], ["default"], 1, 256, protocol="x")
    with pytest.raises(ValueError, match="takes recipes with kernels, not a Codec"):
        evaluate(qwen, text[0], [both(Linear(3, 32))], 1, 256, protocol="deployed")


def test_no_codec_of_others_at_about_four_bits_loses_less_at_as_few(model, text):
    ours = ["default", "vector", "g32"]
    others = ["kivi-4-g64", "kivi-4-g128", "kvarn-4", "turboquant-4", "iq4_nl", "q4_0-hadamard"]
    rows = {row["recipe"]: row for row in evaluate(model, text[0], ours + others, 1, 640, progress=False)}
    for name in others:
        best = min(rows[recipe]["kl"] for recipe in ours if rows[recipe]["bits"] <= rows[name]["bits"])
        assert best < rows[name]["kl"], name
