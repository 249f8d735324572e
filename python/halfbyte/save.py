"""Int4Cache to a safetensors file and back: packed bytes as they are, on any backend, never decoded."""

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file

from . import _native
from .calibrate import Calibration, fingerprint
from .files import read_safetensors
from .layer import DTYPES, Int4Layer
from .recipes import FIELDS, Recipe, fields_of, needs_calibration
from .shared import check_config

FORMAT = "halfbyte-cache"
VERSION = 2  # 1: without offsets that turn
# What two models must share for the cache of one to mean something to the other.
MODEL_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "sliding_window", "layer_types", "rope_theta", "rope_scaling", "rope_parameters"),
)
COUNTS = ("batch", "length", "first", "packed_end", "pages_dropped", "offset_ready", "interleaved")
# Arrays of a packed layer: their dtype in the file; None: the layer's own.
ARRAYS = {
    "page_table": torch.int32,
    "pages": torch.uint8,
    "raw_k": None,
    "raw_v": None,
    "offset_k": torch.float32,
    "offset_v": torch.float32,
    "given_offset_k": torch.float32,
    "given_offset_v": torch.float32,
    "lambda_k": torch.float32,
    "lambda_v": torch.float32,
    "rotation_k": torch.float32,
    "rotation_v": torch.float32,
    "frequencies": torch.float32,
    "counted": torch.uint8,
}


def save(cache, path, model=None) -> None:
    """Writes `cache` to `path` at once or not at all. model: adds its weights' fingerprint, for load to check."""
    tensors, metadata = _to_tensors(cache, model)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, str(partial), metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: cannot write {str(path)!r}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load(cache_class, path, config, model=None, **options):
    """The cache that `save` wrote. Raises ValueError naming what is wrong with the file, or with this model for it."""
    tensors, metadata = read_safetensors(path, "cache")
    return _from_tensors(cache_class, tensors, metadata, config, str(path), model, options)


def to_bytes(cache) -> bytes:
    return save_bytes(*_to_tensors(cache, None))


def from_bytes(cache_class, data: bytes, config, options):
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return _from_tensors(cache_class, load_bytes(data), header["__metadata__"], config, "pickled cache", None, options)


# ---------------------------------------------------------------------------------------------------- saving


def _to_tensors(cache, model):
    if cache.get_seq_length() == 0:
        raise ValueError("save: the cache holds no tokens")
    tensors, layers = {}, []
    for index, layer in enumerate(cache.layers):
        facts, arrays = _packed_layer(layer) if isinstance(layer, Int4Layer) else _library_layer(layer, index)
        layers.append(facts)
        tensors.update({f"layers.{index}.{name}": array for name, array in arrays.items()})
    facts = {
        "halfbyte": _native.version,
        "recipe": fields_of(cache.recipe),
        # Those of layers that have their own.
        "layer_recipes": {
            index: fields_of(recipe) for index, recipe in enumerate(cache.layer_recipes) if recipe != cache.recipe
        },
        "prefill": cache.prefill,
        "model": _model_facts(cache._shared.config),
        "weights": "" if model is None else fingerprint(model),
        "layers": layers,
        "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(facts)
    # One entry: safetensors writes several in random order, and equal caches are to give equal files.
    return tensors, {FORMAT: json.dumps({"version": VERSION, "crc32": zlib.crc32(text.encode()), "facts": text})}


def _recipe(fields):
    return Recipe(**({"offset_span": 0} | fields))  # which files of version 1 do not have


def _packed_layer(layer):
    layer._settle()
    if layer.seen == 0:
        return {"kind": "empty"}, {}
    parts = layer.native.save()
    facts = {
        "kind": "int4",
        "kv_heads": layer.kv_heads,
        "head_dim_k": layer.head_dim_k,
        "head_dim_v": layer.head_dim_v,
        "dtype": DTYPES[layer.dtype],
        "seen": layer.seen,
        **{name: parts[name] for name in COUNTS},
    }
    batch, heads, dims = layer.batch, layer.kv_heads, {"k": layer.head_dim_k, "v": layer.head_dim_v}
    shapes = {"page_table": (batch, -1), "pages": (len(set(parts["page_table"].tolist())), heads, -1)}
    for side, dim in dims.items():
        shapes[f"raw_{side}"] = (batch, heads, -1, dim)
        shapes[f"offset_{side}"] = (batch, heads, dim)
        shapes[f"given_offset_{side}"] = shapes[f"lambda_{side}"] = (heads, dim)
        shapes[f"rotation_{side}"] = (dim, dim)
    shapes["counted"], shapes["frequencies"] = (batch, -1), (-1,)
    arrays = {}
    for name, dtype in ARRAYS.items():
        if parts[name].size:
            arrays[name] = torch.from_numpy(parts[name]).view(dtype or layer.dtype).view(shapes[name])
    return facts, arrays


def _library_layer(layer, index):
    """The state of one of the library's own layers: its attributes, tensors apart."""
    arrays = {}
    try:
        state = {name: _encode(value, name, arrays) for name, value in vars(layer).items()}
    except TypeError as error:
        raise NotImplementedError(f"save: layer {index}, a {type(layer).__name__}, holds {error}") from None
    return {"kind": type(layer).__name__, "state": state}, arrays


def _encode(value, name, arrays):
    if isinstance(value, torch.Tensor):
        # A copy: it may be a view of something larger, or share memory with another tensor.
        arrays[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, f"{name}.{key}", arrays)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_encode(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} in {name}")


def _model_facts(config):
    facts = config.to_dict()
    return json.loads(json.dumps({name: facts[name] for name in MODEL_FIELDS if facts.get(name) is not None}))


def _checksum(tensor):
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


# ---------------------------------------------------------------------------------------------------- loading


def _from_tensors(cache_class, tensors, metadata, config, path, model, options):
    for name in options:
        if name in (*FIELDS, "recipe", "calibration", "prefill", "layers"):
            raise ValueError(f"{name}: the file has its own; load takes drift_every, and max_cache_len if static")
    check_config(config)
    facts = _checked_facts(tensors, metadata, path)
    _check_model(facts, config, path, model)
    try:
        recipe, layers = _recipe(facts["recipe"]), facts["layers"]
        own = {int(index): _recipe(fields) for index, fields in facts["layer_recipes"].items()}
        calibrated = any(map(needs_calibration, [recipe, *own.values()]))
        calibration = _calibration(layers, tensors, recipe) if calibrated else None
        arguments = {"recipe": recipe, "calibration": calibration, "prefill": facts["prefill"], "layers": own}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: the cache file {path!r} is damaged: {error}") from error
    cache = cache_class(config, **arguments, **options)
    try:
        if len(layers) != len(cache.layers):
            raise ValueError(f"it holds {len(layers)} layers, the model {len(cache.layers)}")
        for index, (layer, state) in enumerate(zip(cache.layers, layers, strict=True)):
            prefix = f"layers.{index}."
            arrays = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
            _fill_layer(layer, state, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"path: the cache file {path!r} is damaged: {error}") from error
    room, held = cache._own_options.get("max_cache_len"), int(cache.get_seq_length())
    if room is not None and held > room:
        raise ValueError(f"max_cache_len: got {room}; the cache file {path!r} holds {held} tokens")
    return cache


def _checked_facts(tensors, metadata, path):
    if FORMAT not in metadata:
        raise ValueError(f"path: {path!r} is a safetensors file, but not a {FORMAT} one")
    try:
        head = json.loads(metadata[FORMAT])
        version, crc32, text = int(head["version"]), head["crc32"], str(head.get("facts"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: the cache file {path!r} is damaged: {error}") from error
    if not 1 <= version <= VERSION:
        raise ValueError(
            f"path: {path!r} has format version {version}, takes 1 to {VERSION}: upgrade halfbyte to read it"
        )
    if zlib.crc32(text.encode()) != crc32:
        raise ValueError(f"path: the cache file {path!r} is damaged: the checksum of its facts does not fit")
    facts = json.loads(text)
    if facts["checksums"].keys() != tensors.keys():
        raise ValueError(f"path: the cache file {path!r} is damaged: it has tensors too few or too many")
    for name, tensor in tensors.items():
        if _checksum(tensor) != facts["checksums"][name]:
            raise ValueError(f"path: the cache file {path!r} is damaged: the checksum of {name} does not fit")
    return facts


def _check_model(facts, config, path, model):
    wanted, given = facts["model"], _model_facts(config.get_text_config(decoder=True))
    for name in MODEL_FIELDS:
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"path: {path!r} was saved for another model: {name} is {wanted.get(name)!r} there, "
                f"{given.get(name)!r} in the config"
            )
    if model is not None and facts["weights"] and facts["weights"] != fingerprint(model):
        raise ValueError(
            f"path: {path!r} was saved for a model with other weights (fingerprint {facts['weights']}, "
            f"this one has {fingerprint(model)})"
        )


def _calibration(layers, tensors, recipe):
    """Lambda, rotations, and offsets if they were given: what the cache needs again after a reset."""
    parts = {f"{name}_{side}": f"{name}_{side}" for name in ("lambda", "rotation") for side in "kv"}
    parts |= {f"given_offset_{side}": f"offset_{side}" for side in "kv"}
    if not any(name.endswith(".given_offset_v") for name in tensors):  # K's alone is of its bias
        parts.pop("given_offset_k")
    lists = {
        part: [tensors.get(f"layers.{index}.{name}") for index in range(len(layers))] for name, part in parts.items()
    }
    empty, turns = torch.empty(0), any(name.endswith(".frequencies") for name in tensors)
    return Calibration(
        **{
            part: [empty if tensor is None else tensor for tensor in found] if any(t is not None for t in found) else []
            for part, found in lists.items()
        },
        recipe={"offset_span": recipe.offset_span if turns else 0},
    )


def _fill_layer(layer, facts, arrays):
    kind = facts["kind"]
    if kind == "empty":
        return
    if kind != "int4":
        if kind != type(layer).__name__:
            raise ValueError(f"a layer is a {kind}, the model's a {type(layer).__name__}")
        for name, value in facts["state"].items():
            setattr(layer, name, _decode(value, arrays))
        return
    if not isinstance(layer, Int4Layer):
        raise ValueError(f"a layer is packed, the model's is a {type(layer).__name__}")
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    dtype = dtypes[facts["dtype"]]
    if type(facts["seen"]) is not int or facts["seen"] < facts["length"]:
        raise ValueError(f"seen is {facts['seen']!r} in a layer of {facts['length']} tokens")
    parts = {name: facts[name] for name in COUNTS if name in facts}
    for name, array in arrays.items():
        if array.dtype is not (ARRAYS[name] or dtype):
            raise ValueError(f"{name} is {array.dtype}, takes {ARRAYS[name] or dtype}")
        flat = array.contiguous().view(-1)
        parts[name] = (flat if ARRAYS[name] else flat.view(torch.uint8)).numpy()
    layer.restore(facts, dtype, parts)


def _decode(value, arrays):
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return arrays[content]
    if kind == "dict":
        return {key: _decode(item, arrays) for key, item in content}
    if kind == "list":
        return [_decode(item, arrays) for item in content]
    if kind == "dtype":
        return getattr(torch, content)
    return torch.device(content)
