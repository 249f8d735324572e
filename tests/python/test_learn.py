"""Learning: what it lowers, that the cache runs what it finds, and that an interruption changes nothing."""

import pytest
import torch

from halfbyte import Int4Cache
from halfbyte.calibrate import Calibration
from halfbyte.codecs import Linear
from halfbyte.evaluate import evaluate
from halfbyte.learn import Plan, collect, fit, learn, learned_recipe, output_moments, rounded
from halfbyte.recipes import get_recipe
from halfbyte.simulated import packed


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_is_the_quantisers_and_lets_gradients_through():
    y = normal(2, 30, 64).requires_grad_()
    out = rounded(y, 4, 32)
    plain = Linear(4, 32, search=False, scale_bits=32)(y.detach())
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert (y.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["lambda", "cayley", "householder"])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_kind_lowers_its_loss_and_stays_orthonormal(kind, weighted):
    # Channels of very different size, and errors that matter in few directions: something to gain for each kind.
    z = normal(2, 600, 32) * torch.linspace(-2, 2, 32).exp()
    moment = torch.diag_embed(torch.linspace(3, -3, 32).exp().expand(2, -1)) if weighted else None
    plan = Plan(kind, steps=40, reflectors=8)
    matrix, factors, (before, after) = fit(plan, z, moment, 4, 0, lambda: None)
    assert after < 0.9 * before
    assert factors.shape == (2, 32)
    assert (factors > 0).all()
    if kind == "lambda":
        assert matrix is None
    else:
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(32), rtol=0, atol=1e-4)
        assert (matrix - torch.eye(32)).abs().max() > 0.01


def test_moments_weigh_errors_as_attention_does(qwen, text):
    samples = collect(qwen, text[0, :128], 128, False)
    assert sorted(samples) == [0, 1, 2, 3]
    assert samples[1].parts["k"][0].shape == (2, 128, 128)
    error = normal(2, 128)
    moments = output_moments(qwen, 1, 2)
    weight = qwen.model.layers[1].self_attn.o_proj.weight.detach().float()
    for head in range(2):
        spread = torch.zeros(4, 128)
        spread[2 * head] = error[head]  # each of the two query heads of this KV head passes it on
        other = torch.zeros(4, 128)
        other[2 * head + 1] = error[head]
        expected = (weight @ spread.flatten()).square().sum() + (weight @ other.flatten()).square().sum()
        torch.testing.assert_close(error[head] @ moments[head] @ error[head], expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def learned(qwen, text):
    return learn(qwen, text[0], "default", Plan("cayley", steps=10), progress=False)


def test_the_cache_runs_what_was_learned(learned, qwen, text, tmp_path):
    learned.save(tmp_path / "learned.safetensors")
    back = Calibration.load(tmp_path / "learned.safetensors", qwen)
    recipe = back.learned_recipe()
    assert (recipe.rotation, recipe.lambda_) == ("dense", True)
    assert back.learned["kind"] == "cayley"
    Int4Cache(qwen.config, recipe, calibration=back)
    codec = {"learned": packed(recipe, qwen.config, back), "default": "default"}
    ours, plain = evaluate(qwen, text[0], codec, 1, 640, progress=False)
    assert ours["kl"] < 1.1 * plain["kl"]
    blocks, deployed = (
        evaluate(qwen, text[0], {"learned": codec["learned"]}, 1, 640, protocol=protocol, progress=False)[0]["kl"]
        for protocol in ("blocks", "deployed")
    )
    assert blocks == pytest.approx(deployed, rel=0.15)


def test_an_interrupted_run_ends_with_the_same_bytes(qwen, text, tmp_path, monkeypatch):
    plan, file = Plan("lambda", steps=5), tmp_path / "progress"
    whole = learn(qwen, text[0], "default", plan, progress=False)
    import halfbyte.learn as module

    learn_side, calls = module._learn_side, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return learn_side(*args)

    monkeypatch.setattr(module, "_learn_side", failing)
    with pytest.raises(KeyboardInterrupt):
        learn(qwen, text[0], "default", plan, progress=False, resume=file)
    assert file.is_file()
    resumed = learn(qwen, text[0], "default", plan, progress=False, resume=file)
    assert len(calls) == 4 + 5  # three of eight were done
    assert not file.exists()
    for part in ("lambda_k", "lambda_v"):
        assert all(map(torch.equal, getattr(whole, part), getattr(resumed, part)))


def test_progress_of_another_plan_is_not_taken(qwen, text, tmp_path, monkeypatch):
    import halfbyte.learn as module

    file = tmp_path / "progress"
    monkeypatch.setattr(module._Progress, "close", lambda self: None)
    first = learn(qwen, text[0], "default", Plan("lambda", steps=2), progress=False, resume=file)
    other = learn(qwen, text[0], "default", Plan("lambda", steps=2, seed=1), progress=False, resume=file)
    assert not torch.equal(first.lambda_k[0], other.lambda_k[0])


def test_bad_plans_and_short_texts_are_named(qwen):
    for fields, message in (
        ({"kind": "x"}, "kind: got 'x'; takes one of lambda, cayley, householder"),
        ({"loss": "x"}, "loss: got 'x'"),
        ({"base": "srht"}, "base: got 'srht'"),
        ({"steps": 0}, "steps: got 0; takes at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Plan(**fields)
    with pytest.raises(ValueError, match="got 100 tokens; learning takes at least 512"):
        learn(qwen, torch.arange(100), progress=False)
    assert learned_recipe("g32", Plan("lambda")).v_group == 32
    with pytest.raises(ValueError, match="as the recipe uses a dense rotation"):
        Int4Cache(qwen.config, get_recipe("default", rotation="dense"))
