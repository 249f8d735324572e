"""What the machine allows an attention kernel, and how much of it was reached: from rows of bench attend alone."""

from __future__ import annotations

KERNELS = {"int4": "dot_gops", "fp16": "fma_gflops"}  # and the roof of what each computes with


def roofline_rows(rows: list[dict]) -> list[dict]:
    """One row for each kernel of each row of bench attend.

    A token of a KV head costs `operations` (a product and a sum for each query head, channel, and K and V) on `bytes`
    of K and V. floor_ns is the longer of both at their roof: bytes at the read bandwidth of a set of that size,
    operations at the peak of dot4 (int4) or fma (fp16). share = floor_ns / ns; bound says which roof it is.
    """
    out = []
    for row in rows:
        roofs, operations = row["roofs"], 4 * row["heads"] // row["kv_heads"] * row["head_dim"]
        for kernel, roof in KERNELS.items():
            read_ns = roofs[f"{kernel}_bytes"] / roofs[f"{kernel}_set_gb_per_s"]
            compute_ns = operations / roofs[roof] if roofs[roof] else 0.0
            floor = max(read_ns, compute_ns)
            out.append(
                {key: row[key] for key in ("geometry", "backend", "recipe", "tokens", "threads")}
                | {"kernel": kernel, "ns": row[f"{kernel}_ns"], "floor_ns": floor}
                | {"share": floor / row[f"{kernel}_ns"], "bound": "memory" if floor == read_ns else "arithmetic"}
                | {
                    "operations_per_byte": operations / roofs[f"{kernel}_bytes"],
                    "gops": operations / row[f"{kernel}_ns"],
                }
                | {"set_gb_per_s": roofs[f"{kernel}_set_gb_per_s"]}
            )
    return out
