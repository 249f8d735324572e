"""Squared error of ways to choose a group's 4-bit scale, on Gaussian values: docs/decisions/signed-scales.md."""

import argparse

import numpy as np

# name: (codes of the largest magnitude, lowest code, factors tried, scale carries the sign of the extreme)
RULES = {
    "symmetric, no search (the paper)": (7, -7, (1.0,), False),
    "symmetric, six factors": (7, -8, (1.0, 0.95, 0.9, 0.85, 0.8, 0.75), False),
    "signed, no search": (8, -8, (1.0,), True),
    "signed, six factors (ours)": (8, -8, (1.0, 1.1, 1.05, 0.95, 0.9, 0.85), True),
}


def squared_error(x: np.ndarray, top: int, lowest: int, factors: tuple[float, ...], signed: bool) -> float:
    """Mean squared error a value of x [groups, channels], each group with its best factor; fp16 scales."""
    extreme = x[np.arange(len(x)), np.abs(x).argmax(1)]
    covering = -extreme / top if signed else np.abs(extreme) / top
    errors = []
    for factor in factors:
        scale = (covering * factor).astype(np.float16).astype(np.float64)[:, None]
        codes = np.clip(np.rint(x / scale), lowest, 7)
        errors.append(((x - codes * scale) ** 2).mean(1))
    return float(np.min(errors, axis=0).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=20000, help="groups drawn for each size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    sizes = (16, 32, 128)
    data = {size: random.standard_normal((args.groups, size)) for size in sizes}
    print("squared error x 1000 by group size".ljust(36), *(f"{size:>8}" for size in sizes))
    for name, rule in RULES.items():
        print(name.ljust(36), *(f"{1000 * squared_error(data[size], *rule):8.2f}" for size in sizes))


if __name__ == "__main__":
    main()
