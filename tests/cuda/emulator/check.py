#!/usr/bin/env python3
"""Mutations of the CUDA kernels: PROGRAM's tests must fail where any one of these words does nothing.

usage: check.py PROGRAM SOURCE_FOLDER
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Barriers, exchanges, products and waits, by the line that says them.
WORDS = (
    r"gpu_(?:simd_)?barrier\(\)|__sync\w+\(|gpu_lane_\w+\(|__\w+_sync\(|\bmma(?:_bf16)?\(|transpose_8x8\(|_wait\("
    r"|load_matrices\(|warpgroup_mma\(|product_\w+\(|team_barrier\("
)
FILES = (
    "cuda/append.cu",
    "cuda/attend.cu",
    "cuda/attend.cuh",
    "cuda/attend_raw.cuh",
    "cuda/encode.cu",
    "cuda/encode.cuh",
    "cuda/length.cuh",
    "cuda/merge.cuh",
    "cuda/offset.cu",
    "cuda/rotate.cuh",
    "cuda/running.cuh",
    "cuda/scales.cuh",
    "cuda/sight.cuh",
    "cuda/work.cuh",
    "gpu/attend.h",
    "gpu/attend_packed.h",
    "gpu/rotate.h",
    "gpu/element.h",
)
TESTS = "*Mutations*:CudaFastRotation.*:CudaOffset.*"
# What no run here can notice, by its line or the one before it, and why.
UNSEEN = {
    # Shuffles hold the lanes of a warp together as well; what they do not order is memory.
    "__syncwarp();  // before the slot is filled again",
    "__syncwarp();  // the warp alone uses them",
    "space.weights[row * kRawTokens + lane] = p;",
    "__syncwarp();  // before the memory is filled again",
    "__syncwarp();  // the others' part of the block is there as well",
    # Waits for products hold a team together, and all of its products are over then.
    "team_barrier(team);  // the parts are no longer read",
    # No test here has a thread block that finds places twice.
    "for (int from = 0; from < all; from += kPlaces / kTeamWarps) {",
    # Thread blocks run one after the other: none can see that another has arrived too early.
    "__syncthreads();  // all of it is stored",
    # Has the threads of a warp take one branch; each would be right alone.
    "columns.open_from = __reduce_max_sync(0xffffffffu, max(sight[0].lo, sight[1].lo));",
    "columns.open_to = __reduce_min_sync(0xffffffffu, min(sight[0].end, sight[1].end));",
    # The largest magnitude may be taken of values before or after lambda: it only has to be the same for all.
    "rotated[at] *= in.inverse_lambda_k[(int64_t)head * d + at / kTileRows];",
    # The way of GPUs other than Hopper, which the build with AddressSanitizer takes.
    "mma(v.y[column / 8], x.a[first + i % Steps], words[fragment_index(D, i, 0, column) * 4],",
    "copy_async_wait(call.stages - 1);",
    # Fast transforms around attention are Metal's alone; tests/gpu takes these away.
    "FastRotation<D, 1>::forward(in.rotation_k, VectorSpace{rotated + row, 0, kTileRows}, lane);",
    "FastRotation<D, 1>::back(in.rotation_v, VectorSpace{space.y + row, 0, kTileRows}, tid % kSimd);",
    # Later barriers come before anything that would go wrong.
    "threadIdx.x, call.warps * kSimd);",
    "space.out[at] += mu[at / kTileRows] * space.sum[at % kTileRows];",
}


def places(sources: Path) -> list[tuple[str, int, str]]:
    """(file, line, text) of each word that a run can notice; definitions and comments are none."""
    found = []
    for name in FILES:
        before = ""
        for number, line in enumerate((sources / name).read_text(encoding="utf-8").splitlines(), 1):
            code = line.split("//")[0].strip()
            is_use = re.search(WORDS, code) and not re.match(r"(?:#|template|__device__|gpu_fn|constexpr)", code)
            if is_use and not {before, code, line.strip()} & UNSEEN:
                found.append((name, number, code))
            before = code
    return found


def survives(program: str, place: tuple[str, int, str] | None) -> bool:
    environment = {**os.environ}
    if place:
        environment["HALFBYTE_LEAVE_OUT"] = f"{place[0]}:{place[1]}"
    command = [program, f"--gtest_filter={TESTS}", "--gtest_fail_fast"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300, check=False)
    return done.returncode == 0 and "[  PASSED  ] 0 tests" not in done.stdout


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    program, found = sys.argv[1], places(Path(sys.argv[2]))
    if not survives(program, None):
        sys.exit("error: the tests fail as the kernels are")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda place: survives(program, place), found))
    alive = [place for place, lives in zip(found, results, strict=True) if lives]
    if alive:
        sys.exit("error: not noticed:\n" + "\n".join(f"{name}:{line}: {code}" for name, line, code in alive))
    print(f"{len(found)} barriers, exchanges, products and waits: tests fail without each")


if __name__ == "__main__":
    main()
