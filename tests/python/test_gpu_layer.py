"""GpuLayer against the C++ Layer on random walks: its bookkeeping with plain kernels, then with those of each device.

Metal's run in an emulator, CUDA's where there is a GPU, else in an emulator too.
"""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gpu_walk import KV_HEADS, Walk, assert_same_content  # noqa: E402
from halfbyte.cuda_kernels import CudaKernels  # noqa: E402
from halfbyte.mps_kernels import MetalKernels  # noqa: E402
from plain_kernels import PlainKernels, PlainKernelsOfMps  # noqa: E402

plain = pytest.mark.parametrize("kernels", [PlainKernels, PlainKernelsOfMps])


def cuda_walk(device, recipe="default", dim=128, dtype="float16", **options):
    return Walk(CudaKernels, recipe, dim, dtype, device=device, **options)


@pytest.fixture(params=["metal", "cuda"])
def walk(request):
    """Makes walks on the kernels of a device, of heads that both have."""
    if request.param == "cuda":
        return functools.partial(cuda_walk, request.getfixturevalue("cuda"))
    request.getfixturevalue("shaders")
    return lambda *args, **options: Walk(MetalKernels, *args, **{"dim": 64} | options)


# --------------------------------------------------------------------------------------------------------- bookkeeping


@plain
@pytest.mark.parametrize(
    "options", [{}, {"sink_tokens": 16}, {"raw_window": 32}, {"sink_tokens": 32, "raw_window": 16}]
)
@pytest.mark.parametrize("window", [0, 70])
def test_bookkeeping_is_the_cpp_layers(kernels, options, window):
    walk = Walk(kernels, "passthrough", window=window, seed=len(options) + window, **options)
    for _ in range(15):
        walk.step()


def test_pages_are_added_in_ever_larger_pieces():
    walk = Walk(PlainKernels, "passthrough", batch=1)
    walk.append(3200)
    held = []
    for _ in range(5):
        for _ in range(64):
            walk.append(1)
        held.append(len(walk.ours._pages._chunks))
    assert held == [2, 2, 2, 2, 3]  # four pages at a time
    assert walk.ours.nbytes < 1.2 * walk.theirs.nbytes


@plain
def test_pages_for_a_capacity_are_there_at_once(kernels):
    walk = Walk(kernels, "passthrough")
    walk.ours.reserve(2, 300)
    held = walk.ours.nbytes
    for tokens in (250, 1, 40):
        walk.append(tokens)
        walk.check(1)
    assert walk.ours.nbytes == held


@plain
def test_a_first_prefill_packs_no_more_than_its_window(kernels):
    walk = Walk(kernels, "passthrough", window=40, sink_tokens=16)
    walk.append(200, answered=True)
    assert walk.ours._pages.first == 2  # tokens 128 to 191: those from 161 on are needed
    assert walk.ours._pages.end == 3
    assert walk.ours._sinks is None
    for tokens in (1, 3):
        walk.append(tokens)
        walk.check(tokens)


@plain
def test_a_crop_brings_back_raw_what_the_newest_step_packed(kernels):
    walk = Walk(kernels, "passthrough", sink_tokens=16)
    walk.crop_back_and_go_on()


@plain
def test_what_does_not_fit_is_refused(kernels):
    walk = Walk(kernels, "passthrough")
    walk.append(20)
    k = torch.zeros(3, KV_HEADS, 1, 32)
    with pytest.raises(ValueError, match="batch is 3, but the cache holds 2"):
        walk.ours.append(k, k)
    with pytest.raises(ValueError, match="queries is 3, but the last append held 20"):
        walk.attend(3)
    for rows in ([], [2], [-1]):
        with pytest.raises(ValueError, match="takes one or more of the 2 sequences"):
            walk.ours.select(rows)
    walk.compare()


# ------------------------------------------------------------------------------------------------------ CUDA's kernels


GPU_CASES = [
    ("default", "float16", 128, {}),
    ("default", "bfloat16", 256, {}),
    ("default", "float32", 80, {}),
    ("g16", "float16", 64, {}),
    ("k8v4", "bfloat16", 128, {}),
    ("default", "float16", 128, {"raw_window": 16}),
    ("no-sinks", "float16", 64, {}),
    ("paper-g32", "float16", 128, {}),
    ("default", "float16", 128, {"offset_tokens": 64}),
]


def wander(walk, steps):
    """Fewer steps, of fewer tokens, where no GPU takes them."""
    is_gpu = walk.device.type == "cuda"
    walk.append(50)
    for _ in range(steps if is_gpu else steps // 5):
        walk.step(*([] if is_gpu else [(1, 1, 1, 2, 5, 17, 40)]))


@pytest.mark.parametrize(("recipe", "dtype", "dim", "options"), GPU_CASES)
@pytest.mark.parametrize("window", [0, 70])
def test_walks_like_the_cpp_layer(cuda, recipe, dtype, dim, options, window):
    wander(cuda_walk(cuda, recipe, dim, dtype, window=window, seed=dim + window, **options), 40)


@pytest.mark.parametrize(("dtype", "dim", "span", "pairs"), [
    ("float16", 128, 64, 64), ("bfloat16", 64, 16, 20), ("float16", 256, 64, 128), ("float32", 80, 16, 40),
    ("bfloat16", 128, 64, 30), ("float16", 96, 64, 48),
])  # fmt: skip
@pytest.mark.parametrize("window", [0, 70])
def test_an_offset_that_turns_on_cuda(cuda, dtype, dim, span, pairs, window):
    options = {"offset_span": span, "sink_tokens": 16 * (span == 16)}
    wander(cuda_walk(cuda, "default", dim, dtype, window=window, pairs=pairs, seed=pairs + 1, **options), 30)


def test_a_value_that_can_not_be_coded_raises_later(cuda):
    walk = cuda_walk(cuda, seed=4)
    k, v = (torch.zeros(2, KV_HEADS, 33, 128, dtype=torch.float16, device=cuda) for _ in range(2))
    k[1, 0, 17, 7] = float("nan")  # behind the sinks
    walk.ours.append(k, v)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="not finite"):
        walk.ours.append(k[:, :, :1], v[:, :, :1])
    walk.ours.reset()
    walk.append(40)
    walk.compare()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_works_on_the_second_gpu_while_the_first_is_current():
    walk = cuda_walk("cuda:1", seed=5)
    assert torch.cuda.current_device() == 0
    for _ in range(10):
        walk.step()
    assert torch.cuda.current_device() == 0


# ----------------------------------------------------------------------------------------------------- Metal's kernels


@pytest.mark.parametrize(
    ("recipe", "dtype", "options"),
    [
        ("default", "float32", {"sink_tokens": 16}),  # a fixed offset
        ("default", "float32", {"pairs": 32, "seed": 1}),  # pairs side by side
        ("turning", "float16", {"pairs": 20, "sink_tokens": 16, "seed": 2}),  # spans of a block; some channels stay
        ("default", "float32", {"pairs": 32, "window": 70, "seed": 4}),
    ],
)
def test_random_lives_on_metal(shaders, recipe, dtype, options):
    walk = Walk(MetalKernels, recipe, 64, dtype, batch=1, **options)
    walk.append(50)
    for _ in range(12):
        walk.step((1, 1, 1, 2, 15, 17))


# ------------------------------------------------------------------------------------------------------ kernels of both


def test_attends_with_all_that_narrows_it(walk):
    walk = walk(seed=3, pairs=32)
    walk.append(60)
    walk.append(1)
    walk.check(1, softcap=5.0)
    walk.append(4)
    mask = (torch.rand(2, 1, 4, 65, generator=walk.torch_random) > 0.3).index_fill(3, torch.tensor([64]), True)
    walk.check(4, mask=mask)
    sinks = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, 0.0])
    walk.check(4, mask=mask[..., 5:].contiguous(), softcap=5.0, sinks=sinks)


@pytest.mark.parametrize("first", [7, 40])
@pytest.mark.parametrize("pairs", [0, 20])
def test_padding_is_left_out_of_the_offset(walk, first, pairs):
    walk = walk("no-sinks", seed=first, pairs=pairs)
    counted = torch.ones(2, first, dtype=torch.uint8)
    counted[1, : first // 2] = 0
    walk.append(first, counted)
    walk.append(20)
    walk.compare()
    for side in ("k", "v"):
        ours, theirs = (layer.save()[f"offset_{side}"] for layer in (walk.ours, walk.theirs))
        assert np.abs(ours - theirs).max() < 1e-4


def test_a_mask_that_hides_nothing_changes_no_bit(walk):
    saved = []
    for counted in (None, torch.ones(2, 60, dtype=torch.uint8)):
        same = walk(pairs=20)
        same.append(60, counted)
        saved.append(same.ours.save())
    assert_same_content(*saved)


def test_padding_that_is_cropped_away_is_forgotten(walk):
    walk = walk("no-sinks", pairs=20)
    counted = torch.ones(2, 7, dtype=torch.uint8)
    counted[1, 4:] = 0
    walk.append(7, counted)
    walk.both("crop", 3)
    walk.compare()
    walk.append(3)
    walk.append(30)
    walk.compare()


def test_an_offset_given_for_k_turns_and_is_kept(walk):
    walk = walk("turning", pairs=32)
    mu = torch.randn(KV_HEADS, walk.dim, generator=walk.torch_random)
    walk.both("set_offset", mu.data_ptr(), 0)
    walk.append(40)
    walk.check()
    walk.restore()
    walk.both("crop", 9)
    walk.append(30)
    walk.check(30)
    walk.append(170)  # past the spans whose offsets were computed ahead
    walk.check()
    for name, arguments in (("set_offset", (mu.data_ptr(), 0)), ("set_frequencies", (0, 0))):
        with pytest.raises(ValueError, match="after tokens were packed"):
            getattr(walk.ours, name)(*arguments)


def test_the_default_dtype_does_not_matter(walk):
    """What the kernels write is float32, whatever PyTorch would make of an array without a dtype."""
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        walk = walk("default", seed=3)
        walk.append(150)
        walk.check()
        walk.restore()
        walk.append(1)
        walk.check()
    finally:
        torch.set_default_dtype(was)
