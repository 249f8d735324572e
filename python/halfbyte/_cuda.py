"""ctypes bindings of libhalfbyte_cuda: addresses, strides and streams as ints, in the order of cuda/halfbyte_cuda.h."""

import ctypes
import functools
import os
from pathlib import Path

_INT, _DOUBLE, _ADDRESS = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def _structure(name, *fields):
    """A ctypes.Structure; fields: (space-separated names, type) pairs in the order of cuda/halfbyte_cuda.h."""
    flat = [(field, kind) for names, kind in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": flat})


LayerDescription = _structure(
    "LayerDescription",
    ("kv_heads head_dim_k head_dim_v dtype", _INT),
    ("k_bits v_bits k_group v_group scale_bits search signed_scale", _INT),
    ("rotation seed layer_index", _INT),
)
View = _structure("View", ("data", _ADDRESS), ("batch_stride head_stride token_stride", _INT))
Tables = _structure(
    "Tables",
    ("rotation transposed fragments attend_fragments fast offset rotated_offset lambda_ inverse_lambda", _ADDRESS),
    ("offset_span offset_first offset_count", _INT),
)
Turn = _structure("Turn", ("waves", _ADDRESS), ("span pairs interleaved", _INT))
Pages = _structure("Pages", ("table", _ADDRESS), ("table_stride first_page", _INT), ("pool", _ADDRESS))
Length = _structure(
    "Length",
    ("cells", _ADDRESS),
    ("capacity tail_slots sink_tokens raw_window warm_up sliding_window", _INT),
)
Raw = _structure("Raw", ("k v", View), ("first begin end are_sinks", _INT))
Attend = _structure(
    "Attend",
    ("layer", LayerDescription),
    ("k v", Tables),
    ("pages", Pages),
    ("turn", Turn),
    ("batch heads queries causal", _INT),
    ("scale softcap", _DOUBLE),
    ("length first sliding_window sink_tokens packed_end raw_window warm_up kept", _INT),
    ("q out", View),
    ("mask", _ADDRESS),
    ("mask_tokens mask_batch_stride mask_query_stride", _INT),
    ("sinks", _ADDRESS),
    ("raw", Raw * 3),
    ("n_raw", _INT),
    ("new_k new_v", View),
    ("space arrivals", _ADDRESS),
    ("portable device", _INT),
    ("stream", _ADDRESS),
    ("at", Length),
)
Encode = _structure(
    "Encode",
    ("layer", LayerDescription),
    ("k_tables v_tables", Tables),
    ("pages", Pages),
    ("batch first_token tokens data_first", _INT),
    ("k v", View),
    ("limit", _DOUBLE),
    ("bad", _ADDRESS),
    ("portable device", _INT),
    ("stream", _ADDRESS),
    ("at", Length),
)
Offset = _structure(
    "Offset",
    ("transposed offset rotated_offset span_offset span_rotated_offset", _ADDRESS),
    ("span_count is_mean", _INT),
)
Offsets = _structure(
    "Offsets",
    ("layer", LayerDescription),
    ("turn", Turn),
    ("batch total", _INT),
    ("raw", Raw * 3),
    ("n_raw", _INT),
    ("weights counts", _ADDRESS),
    ("weight_stride first_span", _INT),
    ("k v", Offset),
    ("space", _ADDRESS),
    ("device", _INT),
    ("stream", _ADDRESS),
)
Append = _structure(
    "Append",
    ("layer", LayerDescription),
    ("at", Length),
    ("batch", _INT),
    ("k v k_sinks v_sinks k_tail v_tail", View),
    ("k_offset v_offset", Offset),
    ("turn", Turn),
    ("weights", _ADDRESS),
    ("weight_stride device", _INT),
    ("stream", _ADDRESS),
)
Copy = _structure(
    "Copy",
    ("layer", LayerDescription),
    ("k v k_to v_to", View),
    ("batch tokens device", _INT),
    ("stream", _ADDRESS),
)
Decode = _structure(
    "Decode",
    ("layer", LayerDescription),
    ("k_tables v_tables", Tables),
    ("pages", Pages),
    ("batch first_token tokens out_first out_tokens", _INT),
    ("k v", _ADDRESS),
    ("device", _INT),
    ("stream", _ADDRESS),
)


@functools.lru_cache(maxsize=1)
def load():
    """The library that was installed with the package, or the one that HALFBYTE_CUDA_LIBRARY names. OSError if none."""
    path = os.environ.get("HALFBYTE_CUDA_LIBRARY") or Path(__file__).with_name("libhalfbyte_cuda.so")
    if not Path(path).is_file():
        raise OSError(f"{path} is not there: build it where nvcc is found, with HALFBYTE_CUDA=ON make env")
    return bind(path)


@functools.cache
def why_not(device_index):
    """Why the library can not run on a device; None if it can. Its driver may be too old, or the device itself."""
    try:
        library = load()
    except OSError as error:
        return str(error)
    error = library.halfbyte_cuda_probe(device_index)
    return library.halfbyte_cuda_error(error).decode() if error else None


def driver_version():
    """The newest CUDA that the installed driver runs, as "13.0"; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def installation():
    """{what: state} of everything that CUDA kernels need, for reports."""
    try:
        load()
        library = "installed"
    except OSError as error:
        library = str(error)
    driver = driver_version()
    facts = {"CUDA kernels": library, "NVIDIA driver": f"for CUDA {driver}" if driver else "none found"}
    if library == "installed" and driver:
        facts["CUDA device 0"] = why_not(0) or "usable"
    return facts


def bind(path):
    """The library at `path` with its functions typed."""
    library = ctypes.CDLL(str(path))
    pointer = ctypes.POINTER
    for structure in (Append, Attend, Copy, Decode, Encode, Offsets):
        getattr(library, f"halfbyte_cuda_{structure.__name__.lower()}").argtypes = [pointer(structure)]
    library.halfbyte_cuda_attend_space.argtypes = [pointer(Attend)]
    library.halfbyte_cuda_offsets_space.argtypes = [pointer(Offsets)]
    library.halfbyte_cuda_page_bytes.argtypes = [pointer(LayerDescription)]
    for name in ("fragment_bytes", "attend_fragment_bytes", "fast_bytes"):
        getattr(library, f"halfbyte_cuda_{name}").argtypes = [pointer(LayerDescription), _INT]
    sizes = "attend_space", "offsets_space", "page_bytes", "fragment_bytes", "attend_fragment_bytes", "fast_bytes"
    for name in sizes:
        getattr(library, f"halfbyte_cuda_{name}").restype = _INT
    for name, addresses in (("rotation", 1), ("fast", 1), ("fragments", 2), ("attend_fragments", 2)):
        function = getattr(library, f"halfbyte_cuda_{name}")
        function.argtypes, function.restype = [pointer(LayerDescription), _INT, *[_ADDRESS] * addresses], None
    library.halfbyte_cuda_probe.argtypes = [_INT]
    library.halfbyte_cuda_error.restype = ctypes.c_char_p
    return library
