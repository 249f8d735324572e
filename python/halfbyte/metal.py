"""What every caller of the Metal kernels has to know: their text, sizes and tables, without PyTorch or MLX.

The entry points and their arguments are those of src/gpu/kernels.metal. Not yet run on Apple hardware.
"""

from importlib import resources

import numpy as np

from .gpu_kernels import PAGE_TOKENS

HEAD_DIMS = (64, 80, 96, 128, 256)
CODE_THREADS, ATTEND_THREADS, FINISH_THREADS = 128, 128, 256
PART = 16  # channels of a lane in encode and decode
TILE_ROWS = 8  # rows (query heads × queries) of a group in attend and finish
SMALLEST_SPLIT = 128  # tokens
MAX_RAW = 3
NO_RAW = [0] * 10  # numbers of a span of raw tokens that is not there
NO_TURN = 0, 0, 0  # numbers of an offset that does not turn


def source() -> str:
    """The Metal text that this package brings."""
    return resources.files("halfbyte").joinpath("halfbyte.metal").read_text()


def why_not(head_dim_k, head_dim_v, recipe) -> str | None:
    """Why there are no kernels for such a layer, or None."""
    if head_dim_k != head_dim_v or head_dim_k not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        return f"the Metal kernels take heads of {dims}, K and V alike, not {head_dim_k} and {head_dim_v}"
    if recipe.k_bits == 32:
        return "the Metal kernels take 4 and 8 bits, not 32"
    return None


def padded(dim) -> int:
    return -(-dim // 32) * 32


def code_threads(dim, vectors) -> int:
    """Threads that encode or decode so many vectors."""
    lanes = 2
    while lanes * PART < dim:
        lanes *= 2
    return -(-vectors // (CODE_THREADS // lanes)) * CODE_THREADS


def splits_of(segments, begin, end, cores) -> int:
    """Into how many parts packed tokens [begin, end) go, so that each core has a few groups; 0 when there are none."""
    if begin >= end:
        return 0
    return max(1, min(-(-4 * cores // segments), (end - begin) // SMALLEST_SPLIT))


def page_head_bytes(recipe, dim) -> int:
    """Of one KV head's part of a page: docs/format.md."""
    total = 0
    for bits, group in ((recipe.k_bits, recipe.k_group), (recipe.v_bits, recipe.v_group)):
        groups = 1 if group == 0 else -(-padded(dim) // min(group, padded(dim)))
        total += PAGE_TOKENS * (padded(dim) * bits // 8 + groups * recipe.scale_bits // 8)
    return -(-total // 64) * 64


def _mixed(x):
    """The output function of splitmix64, as in docs/format.md."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def signs(seed, layer_index, dim) -> np.ndarray:
    """±1 for each channel of a layer: docs/format.md."""
    counters = (seed + 0x9E3779B97F4A7C15 * (1 + 512 * layer_index + c) for c in range(dim))
    return np.array([-1.0 if _mixed(x % 2**64) >> 63 else 1.0 for x in counters])


def rotation_table(recipe, layer_index, dim) -> np.ndarray:
    """What a kernel reads of a rotation that is not dense, float32: factors of the channels, and roots for srft."""
    if recipe.rotation == "srht":
        return (signs(recipe.seed, layer_index, dim) / np.sqrt(dim)).astype(np.float32)
    if recipe.rotation != "srft":
        return np.zeros(1, np.float32)
    angles = -2.0 * np.pi * np.arange(dim) / dim
    roots = np.stack([np.cos(angles), np.sin(angles)], axis=1).reshape(-1)
    return np.concatenate([signs(recipe.seed, layer_index, dim) / np.sqrt(2 * dim), roots]).astype(np.float32)
