"""Int4Cache.save, load and pickle: the bits that go on are those that were saved; damaged files say what is wrong."""

import json
import pickle
import random
import struct
from functools import partial

import pytest

from architectures import ARCHITECTURES
from conftest import MODELS, load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from halfbyte import Int4Cache, Int4StaticCache, _native  # noqa: E402
from halfbyte.calibrate import Calibration, calibrate  # noqa: E402
from halfbyte.save import FORMAT  # noqa: E402


@torch.no_grad()
def forward(model, ids, cache):
    model.set_attn_implementation("halfbyte")
    return model(ids, past_key_values=cache).logits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture
def saved(qwen, text, path):
    """A cache of 2 sequences and its file."""
    cache = Int4Cache(qwen.config)
    forward(qwen, torch.cat([text[:, :90], text[:, 100:190]]), cache)
    cache.save(path)
    return cache


def assert_goes_on_alike(model, cache, other, ids):
    for at in range(ids.shape[1] - 5):
        step = ids[:, at : at + 1]
        assert torch.equal(forward(model, step, other), forward(model, step, cache))
    assert torch.equal(forward(model, ids[:, -5:], other), forward(model, ids[:, -5:], cache))


@pytest.mark.parametrize("prefill", ["exact", "consistent"])
@pytest.mark.parametrize("recipe", ["default", "passthrough", "paper-g32", "turning", "k8v4"])
def test_round_trip(model, text, path, recipe, prefill):
    cache = Int4Cache(model.config, recipe, prefill=prefill, sink_tokens=16, raw_window=16)
    forward(model, torch.cat([text[:, :300], text[:, 100:400]]), cache)
    cache.activate_past_recording()
    forward(model, text[:, 400:403].repeat(2, 1), cache)
    cache.crop(-2)
    forward(model, text[:, 500:501].repeat(2, 1), cache)
    cache.save(path)
    other = Int4Cache.load(path, model.config)
    assert other.recipe.sink_tokens == 16
    assert other.prefill == prefill
    before = path.read_bytes()
    other.save(path)
    assert path.read_bytes() == before
    assert_goes_on_alike(model, cache, other, text[:, 420:460].repeat(2, 1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, text, path):
    model = load("tiny-qwen", dtype)
    cache = Int4Cache(model.config)
    forward(model, text[:, :75], cache)
    cache.save(path, model)
    assert load_file(path)["layers.0.raw_k"].dtype is getattr(torch, dtype)
    assert_goes_on_alike(model, cache, Int4Cache.load(path, model.config, model=model), text[:, 100:120])


def test_short_and_staged_caches(model, text, path):
    for tokens in (1, 5, 16, 17):
        cache = Int4Cache(model.config)
        forward(model, text[:, :tokens], cache)
        cache.save(path)
        other = Int4Cache.load(path, model.config)
        forward(model, text[:, 20:21], other)
        forward(model, text[:, 20:21], cache)
        assert_goes_on_alike(model, cache, other, text[:, 21:60])


def test_pages_that_beams_share_are_saved_once(qwen, text, path):
    cache = Int4Cache(qwen.config)
    forward(qwen, text[:, :300], cache)
    cache.save(path)
    single = path.stat().st_size
    cache.batch_repeat_interleave(8)
    cache.save(path)
    assert path.stat().st_size < single + 8 * 4 * 2 * 2 * (16 + 12) * 128 * 4 + 20000  # and 8 raw sinks and tails
    other = Int4Cache.load(path, qwen.config)
    assert other.nbytes < 1.01 * cache.nbytes
    assert torch.equal(
        forward(qwen, text[:, 300:301].repeat(8, 1), other), forward(qwen, text[:, 300:301].repeat(8, 1), cache)
    )


def test_a_file_means_the_same_to_every_backend(qwen, text, saved, path):
    ids, was = text[:, 300:301].repeat(2, 1), _native.backend()
    unpacked = [layer.keys for layer in Int4Cache.load(path, qwen.config).layers]
    try:
        for name, usable in _native.backends():
            if not usable:
                continue
            _native.set_backend(name)
            other = Int4Cache.load(path, qwen.config)
            other.save(path)
            for layer, keys in zip(other.layers, unpacked, strict=True):
                torch.testing.assert_close(layer.keys, keys, rtol=0, atol=1e-4)
            assert forward(qwen, ids, other).isfinite().all()
    finally:
        _native.set_backend(was)
    assert_goes_on_alike(qwen, saved, Int4Cache.load(path, qwen.config), ids.repeat(1, 8))


def test_lambda_comes_back(qwen, text, path):
    calibration = calibrate(qwen, text[:, :200], recipe="paper-g32-lambda")
    cache = Int4Cache(qwen.config, "paper-g32-lambda", calibration)
    forward(qwen, text[:, :100], cache)
    cache.save(path)
    other = Int4Cache.load(path, qwen.config)
    assert_goes_on_alike(qwen, cache, other, text[:, 100:130])
    other.reset()  # and is still there for the next text
    again = Int4Cache(qwen.config, "paper-g32-lambda", calibration)
    assert torch.equal(forward(qwen, text[:, 50:100], other), forward(qwen, text[:, 50:100], again))
    assert torch.equal(forward(qwen, text[:, :1], other), forward(qwen, text[:, :1], again))


def test_dense_rotations_come_back(qwen, text, path):
    torch.manual_seed(7)
    rotations = {f"rotation_{side}": [torch.linalg.qr(torch.randn(128, 128))[0] for _ in range(4)] for side in "kv"}
    calibration = Calibration([], [], [], [], **rotations)
    cache = Int4Cache(qwen.config, calibration=calibration, rotation="dense")
    logits = forward(qwen, text[:, :90], cache)
    cache.save(path)
    tensors = load_file(path)
    for name, per_layer in rotations.items():
        assert torch.equal(tensors[f"layers.3.{name}"], per_layer[3])
    other = Int4Cache.load(path, qwen.config)
    assert_goes_on_alike(qwen, cache, other, text[:, 90:150])
    other.reset()
    assert torch.equal(forward(qwen, text[:, :90], other), logits)  # the rotations outlive the tokens
    assert_goes_on_alike(qwen, Int4Cache.load(path, qwen.config), other, text[:, 90:150])


@pytest.mark.parametrize("name", ["lfm2", "qwen3-next", "gemma3n", "mistral", "deepseek-v3"])
def test_layers_of_every_kind(name, path):
    model = ARCHITECTURES[name].build()
    ids = torch.randint(3, 120, (1, 90), generator=torch.Generator().manual_seed(2))
    cache = Int4Cache(model.config)
    forward(model, ids[:, :70], cache)
    cache.save(path)
    other = Int4Cache.load(path, model.config)
    for at in range(70, 90):
        assert torch.equal(forward(model, ids[:, at : at + 1], other), forward(model, ids[:, at : at + 1], cache))


def test_pickle(qwen, text, saved):
    other = pickle.loads(pickle.dumps(saved))
    assert_goes_on_alike(qwen, saved, other, text[:, 300:320].repeat(2, 1))
    forward(qwen, text[:, 320:321].repeat(2, 1), saved)
    forward(qwen, text[:, 320:321].repeat(2, 1), other)
    assert other.nbytes == saved.nbytes


@pytest.mark.parametrize("make", [Int4Cache, partial(Int4StaticCache, max_cache_len=90)])
def test_an_empty_cache_is_pickled_as_it_was_made(qwen, text, make):
    calibration = calibrate(qwen, text[:, :64], progress=False)
    cache = make(qwen.config, recipe="paper-g32-lambda", layers={0: "k8v4"}, calibration=calibration)
    other = pickle.loads(pickle.dumps(cache))
    assert_goes_on_alike(qwen, cache, other, text[:, :80])
    assert (type(other), other.recipe, other.layer_recipes) == (type(cache), cache.recipe, cache.layer_recipes)
    other.reset()
    assert pickle.loads(pickle.dumps(other)).get_seq_length() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "g32"}, "recipe: the file has its own; load takes drift_every"),
        ({"sink_tokens": 0}, "sink_tokens: the file has its own"),
    ],
)
def test_options_that_the_file_decides(qwen, saved, path, options, message):
    with pytest.raises(ValueError, match=message):
        Int4Cache.load(path, qwen.config, **options)
    with pytest.raises(ValueError, match="config: got Qwen2ForCausalLM, takes a model's config"):
        Int4Cache.load(path, qwen)


def test_nothing_to_save(qwen, path):
    with pytest.raises(ValueError, match="holds no tokens"):
        Int4Cache(qwen.config).save(path)
    assert not path.exists()


def test_a_path_that_can_not_be_written(saved, tmp_path):
    with pytest.raises(ValueError, match="cannot write"):
        saved.save(tmp_path / "no" / "cache.safetensors")


# ---------------------------------------------------------------------------------------------------- bad files


def test_missing(qwen, path):
    with pytest.raises(ValueError, match="no cache file"):
        Int4Cache.load(path, qwen.config)


def test_foreign(qwen):
    with pytest.raises(ValueError, match="is a safetensors file, but not a halfbyte-cache one"):
        Int4Cache.load(MODELS / "tiny-qwen" / "model.safetensors", qwen.config)


def rewrite(path, change):
    """Applies change(head, facts) to a file's description, with a checksum that fits again."""
    import zlib

    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    tensors = load_file(path)
    head = json.loads(header["__metadata__"][FORMAT])
    facts = json.loads(head["facts"])
    change(head, facts)
    head["facts"] = json.dumps(facts)
    head["crc32"] = zlib.crc32(head["facts"].encode())
    save_file(tensors, path, {FORMAT: json.dumps(head)})


@pytest.mark.parametrize("version", [3, 0])
def test_other_versions(qwen, saved, path, version):
    rewrite(path, lambda head, facts: head.update(version=version))
    with pytest.raises(ValueError, match=f"format version {version}, takes 1 to 2: upgrade halfbyte"):
        Int4Cache.load(path, qwen.config)


def test_version_1_had_fixed_offsets(qwen, text, path):
    cache = Int4Cache(qwen.config, "fixed-offset")
    forward(qwen, text[:, :200], cache)
    cache.save(path)

    def as_it_was(head, facts):
        head["version"] = 1
        del facts["recipe"]["offset_span"]
        for layer in facts["layers"]:
            del layer["interleaved"]

    rewrite(path, as_it_was)
    other = Int4Cache.load(path, qwen.config)
    assert other.recipe.offset_span == 0
    assert_goes_on_alike(qwen, cache, other, text[:, 300:320])


def test_other_models(qwen, gemma, saved, path):
    with pytest.raises(ValueError, match="another model: model_type is 'qwen2' there, 'gemma3_text'"):
        Int4Cache.load(path, gemma.config)


def test_other_weights(qwen, saved, path):
    saved.save(path, qwen)
    Int4Cache.load(path, qwen.config, model=qwen)
    other = load("tiny-qwen")
    other.model.layers[0].self_attn.k_proj.weight.data.mul_(2)
    with pytest.raises(ValueError, match="other weights"):
        Int4Cache.load(path, qwen.config, model=other)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9, 0.9999])
def test_truncated(qwen, saved, path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Int4Cache.load(path, qwen.config)


def test_flipped_bits_are_noticed(qwen, saved, path):
    data, dice = path.read_bytes(), random.Random(4)
    wanted, refusals = [layer.keys for layer in saved.layers], []
    for _ in range(150):
        damaged = bytearray(data)
        at = dice.randrange(len(data)) if dice.random() < 0.5 else dice.randrange(4000)
        damaged[at] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            other = Int4Cache.load(path, qwen.config)
        except ValueError as refusal:
            refusals.append(str(refusal))
        else:  # white space or such in the file's header: the content must be what it was
            for layer, keys in zip(other.layers, wanted, strict=True):
                assert torch.equal(layer.keys, keys)
    assert len(refusals) > 100
    assert all("path: " in refusal for refusal in refusals)


FIELDS = ("batch", "length", "first", "packed_end", "pages_dropped", "offset_ready", "seen", "kv_heads", "head_dim_k")


def test_descriptions_that_do_not_fit_the_arrays(qwen, saved, path):
    """A file of right checksums and wrong numbers: each is refused, or does what it says without a crash."""
    data, dice = path.read_bytes(), random.Random(5)
    values = (-1, 0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 90, 1 << 20, 1 << 40, 1 << 63, "x", None, 0.5, [])
    refusals = []
    for _ in range(200):
        path.write_bytes(data)
        field, value, layer = dice.choice(FIELDS), dice.choice(values), dice.randrange(4)
        rewrite(path, lambda head, facts, f=field, v=value, i=layer: facts["layers"][i].update({f: v}))
        try:
            other = Int4Cache.load(path, qwen.config)
            assert other.layers[layer].keys is not None
        except ValueError as refusal:
            refusals.append(str(refusal))
    assert len(refusals) > 150
    assert all("is damaged" in refusal for refusal in refusals)


def test_arrays_that_are_missing_or_of_another_kind(qwen, saved, path):
    data = path.read_bytes()
    rewrite(path, lambda head, facts: facts["checksums"].pop("layers.1.pages"))
    with pytest.raises(ValueError, match="damaged"):
        Int4Cache.load(path, qwen.config)
    path.write_bytes(data)
    rewrite(path, lambda head, facts: facts["recipe"].update(k_bits=8))
    with pytest.raises(ValueError, match=r"damaged.*another size"):
        Int4Cache.load(path, qwen.config)
    path.write_bytes(data)
    rewrite(path, lambda head, facts: facts["recipe"].update(colour="red"))
    with pytest.raises(ValueError, match="damaged"):
        Int4Cache.load(path, qwen.config)
