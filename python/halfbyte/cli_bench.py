"""The commands `halfbyte bench …`: each times one part against what it replaces, both in one process."""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_tools import (
    BYTES_RATIO,
    JsonFile,
    ModelName,
    PlotFile,
    Quiet,
    Seed,
    begin,
    report,
    reports_errors,
    whole_numbers,
)

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Times one part against what it replaces, both in one process.",
)

Backends = Annotated[
    str | None,
    typer.Option("--backend", help="Kernels to time, with commas between, or cuda alone. Default: those in use."),
]
Geometries = Annotated[
    str, typer.Option("--geometry", help="Head geometries with commas between: qwen, gemma, smollm2, llama8b.")
]
Recipes = Annotated[str, typer.Option("--recipe", help="What packs the cache; several with commas between.")]
Rounds = Annotated[int, typer.Option(help="Rounds that the median is taken over.", min=1)]
BESIDE = "In brackets: the quartiles of the rounds' ratios."
ON_GPU = "Medians on one GPU; each call a CUDA graph with a cold L2 cache."


def split(names: str | None) -> list[str]:
    return [] if names is None else [name.strip() for name in names.split(",")]


@bench.command()
@reports_errors
def attend(
    geometry: Geometries = "qwen",
    heads: Annotated[int | None, typer.Option(help="Query heads, for a geometry of your own.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Its key-value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Its channels a head.")] = None,
    tokens: Annotated[str, typer.Option(help="Cache lengths.")] = "4096,32768",
    queries: Annotated[
        str | None, typer.Option(help="New tokens at a time: several attend to a packed prefix of `tokens`.")
    ] = None,
    threads: Annotated[str, typer.Option(help="Thread counts.")] = "1,2",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    backend: Backends = None,
    recipe: Recipes = "default",
    rounds: Rounds = 9,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
):
    """Attention of one new token: our fp16 kernel, packed codes, and transformers' sdpa in bfloat16.

    Times are wall nanoseconds per token per key-value head, all arms in turn in one process. read_bandwidth_share is
    what int4 reads a second over the read bandwidth measured with as many threads; short caches fit the processor's
    own memory and can exceed 1. transformers does not fold the query heads that share a key-value head into one
    product, which costs bfloat16 much on processors without matrix units; sdpa_folded does, and fp16 is the tuned
    baseline.

    With --queries, several new tokens attend to a packed prefix at once, against unpacking it for sdpa in the quickest
    of float32 and bfloat16, folded or not; times are milliseconds a call.

    Example: `halfbyte bench attend --geometry qwen,gemma --tokens 4096 --threads 2 --plot roofline.png`

    With --backend cuda, microseconds on one GPU in fp16, beside PyTorch's flash attention with the group folded and its
    sdpa as transformers calls it; no --threads, --queries or --plot.

    Example: `halfbyte bench attend --queries 4,64 --tokens 8192 --threads 2 --json queries.json`

    Example: `halfbyte bench attend --backend cuda --batch 32 --geometry qwen,gemma --tokens 32768`
    """
    begin(json_file, timed=True, plot=plot)
    sizes, counts = whole_numbers(tokens, "tokens", 16), whole_numbers(threads, "threads")
    from .bench import named_geometries, own_geometry

    own = heads is not None or kv_heads is not None or head_dim is not None
    geometries = [own_geometry(heads, kv_heads, head_dim)] if own else named_geometries(geometry)
    shapes = "; ".join(f"{g.name}: {g.heads}/{g.kv_heads} heads of {g.head_dim}" for g in geometries)
    common = {"batch": batch, "recipes": split(recipe), "rounds": rounds, "seed": seed, "progress": not quiet}
    if backend == "cuda":
        from .bench_cuda import bench_attend

        if queries is not None or plot is not None:
            raise ValueError("backend: cuda takes neither --queries nor --plot")
        report(f"attend, {shapes}", bench_attend(geometries, sizes, **common), json_file, {"seed": seed}, ON_GPU)
        return
    common["backends"] = split(backend)
    from .bench_attend import bench_attend, bench_queries

    if queries is not None:
        if plot is not None:
            raise ValueError("plot: draws attention of one new token; takes no --queries")
        rows = bench_queries(geometries, sizes, whole_numbers(queries, "queries", 2), counts, **common)
        title = f"attend, several queries, {shapes}, batch {batch}"
        report(title, rows, json_file, {"seed": seed}, f"ms a call. {BESIDE}")
        return
    rows = bench_attend(geometries, sizes, counts, **common)
    shown = [{key: value for key, value in row.items() if key not in ("heads", "kv_heads", "head_dim")} for row in rows]
    title = f"attend, {shapes}, batch {batch}"
    report(title, shown, None, {}, f"ns per token per KV head. {BESIDE}")
    finish_attend(rows, json_file, plot, seed)


def finish_attend(rows, json_file, plot, seed) -> None:
    """The files of bench attend and bench roofline. The plot shows the last backend, recipe and number of threads."""
    from .roofline import roofline_rows

    if json_file is not None:
        from .results import command_line, write_json

        write_json(json_file, rows, command_line(), seeds={"seed": seed}, roofline=roofline_rows(rows))
    if plot is not None:
        from .plots import plot_roofline

        last = {key: rows[-1][key] for key in ("backend", "recipe", "threads")}
        drawn = [row for row in rows if last.items() <= row.items()]
        plot_roofline(roofline_rows(drawn), rows[-1]["roofs"], plot)


@bench.command()
@reports_errors
def roofline(
    geometry: Geometries = "qwen,gemma,smollm2,llama8b",
    tokens: Annotated[str, typer.Option(help="Cache lengths.")] = "1024,4096,32768",
    threads: Annotated[str | None, typer.Option(help="Thread counts. Default: one a core.")] = None,
    backend: Backends = None,
    recipe: Recipes = "default",
    rounds: Rounds = 9,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
):
    """How near the attention kernels come to what the machine allows, measured in the same run.

    A kernel must read K and V, at the read bandwidth of a set of that size, and compute on them, at the peak of its
    instruction; floor_ns is the longer of both, and share what of the measured time it is. Nothing else a kernel does
    is in the floor: softmax, scales, unpacking of codes and the start of threads all show as distance to it.

    Example: `halfbyte bench roofline --geometry qwen,gemma --plot roofline.png --json roofline.json`
    """
    begin(json_file, timed=True, plot=plot)
    from .bench import named_geometries
    from .bench_attend import bench_attend
    from .results import print_table, usable_cores
    from .roofline import roofline_rows

    sizes = whole_numbers(tokens, "tokens", 16)
    counts = [usable_cores()] if threads is None else whole_numbers(threads, "threads")
    rows = bench_attend(
        named_geometries(geometry), sizes, counts, 1, split(recipe), split(backend), rounds, seed,
        sdpa=False, progress=not quiet,
    )  # fmt: skip
    shown = roofline_rows(rows)
    print_table(
        "roofline", shown, "ns per token per KV head; gops: 1e9 operations a second, a product and a sum being two"
    )
    finish_attend(rows, json_file, plot, seed)


@bench.command()
@reports_errors
def encode(
    head_dim: Annotated[int, typer.Option(help="Channels a vector.")] = 128,
    vectors: Annotated[int, typer.Option(help="Vectors packed in one pass.")] = 262144,
    backend: Backends = None,
    rounds: Annotated[int, typer.Option(help="Passes that the median is taken over.", min=1)] = 5,
    json_file: JsonFile = None,
    seed: Seed = 0,
):
    """Packing random vectors on one thread, with several recipes in turn.

    With --backend cuda: so many K and as many V vectors in one launch on a GPU, beside a copy of memory.

    Example: `halfbyte bench encode --head-dim 256 --vectors 65536`
    """
    begin(json_file, timed=True)
    if backend == "cuda":
        from . import bench_cuda

        rows = bench_cuda.bench_encode(head_dim, vectors, rounds=rounds, seed=seed)
        report(f"encode, {vectors} K and V vectors", rows, json_file, {"seed": seed}, ON_GPU)
        return
    from .bench_encode import bench_encode

    rows = bench_encode(head_dim, vectors, split(backend), rounds, seed)
    report(
        f"encode, {vectors} vectors, one thread",
        rows,
        json_file,
        {"seed": seed},
        "In brackets: quartiles of the rounds.",
    )


@bench.command()
@reports_errors
def generate(
    model: ModelName = "tiny-qwen",
    prefix: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "256,1024,4096",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded a round.", min=1)] = 32,
    rounds: Rounds = 5,
    recipe: Annotated[str, typer.Option(help="What packs the cache.")] = "default",
    backend: Annotated[str | None, typer.Option(help="cuda: on a GPU; takes models qwen2.5-1.5b, gemma-3-1b.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences, with --backend cuda.", min=1)] = 1,
    static: Annotated[
        bool, typer.Option("--static", help="With --backend cuda: StaticCache and Int4StaticCache, compiled, too.")
    ] = False,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
):
    """Greedy decoding after a prompt: Int4Cache against DynamicCache, in rounds that take turns.

    Each side runs in float32 and in bfloat16 and its quicker dtype counts; fp_cache_bytes is always the bfloat16
    cache's.

    With --backend cuda: models of that shape with random weights in bfloat16; peak memory is that of the prefill,
    without the weights.

    Example: `halfbyte bench generate --model tiny-gemma --prefix 4096,16384 --json generate.json`

    Example: `halfbyte bench generate --backend cuda --model qwen2.5-1.5b --batch 32 --prefix 16384`
    """
    begin(json_file, timed=True, plot=plot)
    prefixes = whole_numbers(prefix, "prefix", 16)
    if backend is not None:
        if backend != "cuda":
            raise ValueError(f"backend: got {backend!r}; bench generate takes cuda, or none for the CPU")
        from . import bench_cuda

        arms = ("dynamic", "int4", *(bench_cuda.COMPILED if static else ()))
        rows = bench_cuda.bench_generate(model, prefixes, new_tokens, rounds, recipe, batch, arms, seed, not quiet)
        report(
            f"generate, {model}, batch {batch}, recipe {recipe}", rows, json_file, {"seed": seed}, "One GPU; medians."
        )
        return
    from .bench_generate import bench_generate

    rows = bench_generate(model, prefixes, new_tokens, rounds, recipe, seed, not quiet)
    report(f"generate, {model}, recipe {recipe}", rows, json_file, {"seed": seed}, BESIDE, BYTES_RATIO)
    if plot is not None:
        from .plots import plot_generate

        plot_generate(rows, plot)


@bench.command()
@reports_errors
def glue(
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Channels a head.")] = 128,
    layers: Annotated[int, typer.Option(help="Attention layers.", min=1)] = 4,
    prefix: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "256,4096",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded, which medians are taken over.", min=1)] = 128,
    recipe: Annotated[str, typer.Option(help="What packs the cache.")] = "default",
    json_file: JsonFile = None,
    seed: Seed = 0,
):
    """What Python and its checks cost a decoding step: cache update and attention less the extension's own time.

    Wall microseconds a layer, float32, one thread. int4 and fp are the whole of an Int4Cache's and a DynamicCache's
    update and attention; glue is what remains of each without the kernels inside: the extension's append and attend,
    or torch.cat and scaled_dot_product_attention. The defaults are tiny-qwen's geometry.

    Example: `halfbyte bench glue --layers 24 --prefix 1024 --json glue.json`
    """
    begin(json_file, timed=True)
    prefixes = whole_numbers(prefix, "prefix", 16)
    from .bench_glue import bench_glue

    rows = bench_glue(heads, kv_heads, head_dim, layers, prefixes, new_tokens, recipe, seed)
    title = f"glue, {layers} layers, {heads}/{kv_heads} heads of {head_dim}, recipe {recipe}"
    report(title, rows, json_file, {"seed": seed}, "us a layer for one token, one thread")
