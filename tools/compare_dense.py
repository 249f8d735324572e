"""Dense rotation by an installed BLAS: ns a vector of NumPy's float32 product on one thread, for docs/decisions."""

import os
import statistics
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy loads

import numpy as np

VECTORS = 65536


def nanoseconds(head_dim: int, at_once: int, rounds: int = 7) -> float:
    """Median over rounds of `at_once` vectors a product, VECTORS in all."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((head_dim, head_dim), dtype=np.float32)
    x = random.standard_normal((at_once, head_dim), dtype=np.float32)
    out, times = np.empty_like(x), []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(VECTORS // at_once):
            np.matmul(x, matrix.T, out=out)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / VECTORS * 1e9


if __name__ == "__main__":
    for head_dim in (64, 128, 256):
        print(
            head_dim,
            *(f"{nanoseconds(head_dim, at_once):.0f} ns a vector, {at_once} at once" for at_once in (512, VECTORS)),
        )
