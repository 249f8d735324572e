"""The command `halfbyte`: demo, bench, eval, calibrate and doctor. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

HELP = "A key-value cache in 4 bits, and attention directly on its codes."
app = typer.Typer(
    name="halfbyte",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Times one part against what it replaces, both in one process.",
)
app.add_typer(bench, name="bench")

ModelName = Annotated[str, typer.Option("--model", help="A folder, a hub id, tiny-qwen, tiny-gemma or smollm2.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write rows, machine and commit to this file.")]
Seed = Annotated[int, typer.Option(help="Of everything random here.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: what the model computes in.")]


def reports_errors(command):
    """Bad input becomes one line on stderr and exit status 2; HALFBYTE_TRACEBACK=1 shows where it came from."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, NotImplementedError, ImportError, OSError) as error:
            if os.environ.get("HALFBYTE_TRACEBACK"):
                raise
            text = str(error)
            if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "transformers", "tqdm"):
                text = f"{error.name} is not installed: pip install 'halfbyte[hf]'"
            print("halfbyte: " + " ".join(text.split()), file=sys.stderr)
            raise typer.Exit(2) from error

    return run


def whole_numbers(text: str, option: str, least: int = 1) -> list[int]:
    """ "256,1024" as [256, 1024]; ValueError naming the option."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: got {text!r}; takes whole numbers with commas between, such as 256,1024") from None
    if min(numbers) < least:
        raise ValueError(f"{option}: got {min(numbers)}; takes numbers of at least {least}")
    return numbers


def report(title, rows, json_file, seeds, caption=None, extra=None):
    """The table on stdout, the file if asked for. extra: ratio columns, {name: row -> value}, for the table alone."""
    from .results import command_line, print_table, write_json

    shown = [
        {key: value for key, value in row.items() if not isinstance(value, list)}
        | {name: ratio(row) for name, ratio in (extra or {}).items()}
        for row in rows
    ]
    print_table(title, shown, caption)
    if json_file is not None:
        write_json(json_file, rows, command_line(), seeds=seeds)


def begin(file, argument="json", timed=False) -> None:
    """What every command checks before it starts."""
    from .results import check_writable, warn_if_busy

    check_writable(file, argument)
    if timed:
        warn_if_busy()


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    if version:
        from . import _native

        print(f"halfbyte {_native.version} ({_native.commit})")
        raise typer.Exit()


SPEED_RATIO = {
    "time ratio": lambda r: r["int4_ms_per_token"] / r["fp_ms_per_token"],
    "bytes ratio": lambda r: r["fp_cache_bytes"] / r["int4_cache_bytes"],
}


@app.command()
@reports_errors
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder, a hub id, tiny-qwen, tiny-gemma or smollm2; may be repeated. Default: both tiny models."
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "256,1024,4096",
    text: Annotated[Path | None, typer.Option(help="Measure on this file, not on text the model samples.")] = None,
    json_file: JsonFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
):
    """Speed, bytes, quality and a continuation with a packed cache beside the full one.

    Needs no network: the two tiny models come with the repository, and the text is sampled from the model itself.

    Example: `halfbyte demo --model tiny-qwen --prefix 256,4096 --json demo.json`
    """
    begin(json_file, timed=True)
    prefixes = whole_numbers(prefix, "prefix", 16)
    from .demo import MODELS, SCORED_TOKENS, demo_model

    rows = []
    for name in model or MODELS:
        source = f"the file {text}" if text else f"text sampled from {name} (seed {seed})"
        print(
            f"{name}: decoding after a prompt; quality on the {SCORED_TOKENS} tokens that follow, of {source}",
            flush=True,
        )
        its_rows, texts = demo_model(name, prefixes, text, seed=seed, progress=not quiet)
        rows += its_rows
        shown = [{key: value for key, value in row.items() if key != "model"} for row in its_rows]
        report(
            name,
            shown,
            None,
            {},
            "fp: DynamicCache with sdpa; int4: Int4Cache. The quicker of float32 and bfloat16 "
            "counts for each; fp bytes are bfloat16's.",
            SPEED_RATIO,
        )
        show_continuations(texts)
    if json_file is not None:
        from .results import command_line, write_json

        write_json(json_file, rows, command_line(), seeds={"seed": seed})


def show_continuations(texts: dict) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("full cache", ratio=1)
    table.add_column("packed cache", ratio=1)
    table.add_row(escape(texts["full"]), escape(texts["packed"]))
    console = Console()
    console.print(f"\nGreedy continuation of “…{texts['prompt']}” ({texts['agree']}):", highlight=False, markup=False)
    console.print(table)


@bench.command()
@reports_errors
def attend(
    heads: Annotated[int, typer.Option(help="Query heads.")] = 12,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Channels a head.")] = 128,
    tokens: Annotated[str, typer.Option(help="Cache lengths.")] = "4096,32768",
    threads: Annotated[str, typer.Option(help="Thread counts.")] = "1,2",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    recipe: Annotated[str, typer.Option(help="What packs the cache.")] = "default",
    rounds: Annotated[int, typer.Option(help="Rounds that the median is taken over.", min=1)] = 9,
    json_file: JsonFile = None,
    seed: Seed = 0,
):
    """Attention of one new token: our fp16 kernel, packed codes, and transformers' sdpa in bfloat16.

    Times are wall nanoseconds per token per key-value head, the three in turn in one process. read_bandwidth_share is
    what int4 reads a second over the read bandwidth measured with as many threads; short caches fit the processor's
    own memory and can exceed 1. transformers does not fold the query heads that share a key-value head into one
    product, which costs bfloat16 much on processors without matrix units; fp16 is the tuned baseline.

    Example (Gemma's geometry): `halfbyte bench attend --heads 4 --kv-heads 1 --head-dim 256 --tokens 4096 --threads 2`
    """
    begin(json_file, timed=True)
    sizes, counts = whole_numbers(tokens, "tokens", 16), whole_numbers(threads, "threads")
    from .bench import bench_attend

    rows = bench_attend(heads, kv_heads, head_dim, sizes, counts, batch, recipe, rounds, seed)
    report(
        f"attend, {heads}/{kv_heads} heads of {head_dim}, batch {batch}, recipe {recipe}",
        rows,
        json_file,
        {"seed": seed},
        "ns per token per KV head",
        {"fp16/int4": lambda r: r["fp16_ns"] / r["int4_ns"], "sdpa/int4": lambda r: r["sdpa_ns"] / r["int4_ns"]},
    )


@bench.command()
@reports_errors
def encode(
    head_dim: Annotated[int, typer.Option(help="Channels a vector.")] = 128,
    vectors: Annotated[int, typer.Option(help="Vectors packed in one pass.")] = 262144,
    rounds: Annotated[int, typer.Option(help="Passes that the median is taken over.", min=1)] = 5,
    json_file: JsonFile = None,
    seed: Seed = 0,
):
    """Packing random vectors on one thread, with several recipes in turn.

    Example: `halfbyte bench encode --head-dim 256 --vectors 65536`
    """
    begin(json_file, timed=True)
    from .bench import bench_encode

    rows = bench_encode(head_dim, vectors, rounds, seed)
    report(f"encode, {vectors} vectors, one thread", rows, json_file, {"seed": seed})


@bench.command()
@reports_errors
def generate(
    model: ModelName = "tiny-qwen",
    prefix: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "256,1024,4096",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded a round.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds that the median is taken over.", min=1)] = 5,
    recipe: Annotated[str, typer.Option(help="What packs the cache.")] = "default",
    json_file: JsonFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
):
    """Greedy decoding after a prompt: Int4Cache against DynamicCache, in rounds that take turns.

    Each side runs in float32 and in bfloat16 and its quicker dtype counts; fp_cache_bytes is always the bfloat16
    cache's.

    Example: `halfbyte bench generate --model tiny-gemma --prefix 4096,16384 --json generate.json`
    """
    begin(json_file, timed=True)
    prefixes = whole_numbers(prefix, "prefix", 16)
    from .bench import bench_generate

    rows = bench_generate(model, prefixes, new_tokens, rounds, recipe, seed, not quiet)
    report(f"generate, {model}, recipe {recipe}", rows, json_file, {"seed": seed}, extra=SPEED_RATIO)


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
    from .bench import bench_glue

    rows = bench_glue(heads, kv_heads, head_dim, layers, prefixes, new_tokens, recipe, seed)
    title = f"glue, {layers} layers, {heads}/{kv_heads} heads of {head_dim}, recipe {recipe}"
    report(title, rows, json_file, {"seed": seed}, "us a layer for one token, one thread")


@app.command("eval")
@reports_errors
def evaluate(
    text: Annotated[Path, typer.Option(help="A UTF-8 text file to measure on.")],
    model: ModelName = "tiny-qwen",
    recipe: Annotated[str, typer.Option(help="Recipes with commas between; fp is the full cache.")] = "fp,default",
    windows: Annotated[int, typer.Option(help="Windows of the text, from its start.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    protocol: Annotated[
        str, typer.Option(help="packed, blocks, deployed or pre-rope: what is packed when, see above.")
    ] = "packed",
    calib: Annotated[
        Path | None, typer.Option(help="Text for recipes with lambda; without it they use text sampled from the model.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A file of `halfbyte calibrate`, for every recipe; one with learned rotations "
            "adds the recipe `learned`."
        ),
    ] = None,
    offset_tokens: Annotated[int, typer.Option(help="Tokens whose mean is the offset.", min=1)] = 256,
    seeds: Annotated[str, typer.Option(help="Of the rotation's signs; several give mean and deviation.")] = "0",
    greedy: Annotated[
        int, typer.Option(help="Also decode so many tokens and count those before the first that differs.", min=0)
    ] = 0,
    needles: Annotated[
        int, typer.Option(help="Also hide so many needles in random tokens and ask for them.", min=0)
    ] = 0,
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
    quiet: Quiet = False,
):
    """Perplexity, KL divergence (nats a token) and top-1 agreement of recipes against the full cache.

    kl_p99 is what 99 % of the tokens stay below; the JSON file also has the mean KL in eighths of the window. Recipes:
    fp, default, no-offset, paper-per-token, paper-g32, paper-g32-lambda, g32, g16, k8v4; simulated, as there are no
    kernels: k2v2, k3v3, k4v3, k6v6, table, turning, turning-table; codecs of others, simulated: q4_0, q4_0-hadamard,
    quanto-int4, hqq-int4, kivi-4-g64, turboquant-4, kvarn-4, nvfp4, fp8-e4m3. An unknown name lists all.

    Protocols: packed, every token is packed before it is attended, which is harsher than decoding with a cache;
    blocks, the cache's block rule, simulated; deployed, through a real Int4Cache; pre-rope, the outputs of the
    projections are packed before norms and RoPE, as in arXiv 2605.05699.

    Example: `halfbyte eval --model tiny-qwen --text book.txt --recipe fp,default,q4_0-hadamard --windows 4`
    """
    begin(json_file)
    from .models import encode_text, load_model, read_text

    content, calib_text = read_text(text), None if calib is None else read_text(calib, "calib")
    from .calibrate import Calibration
    from .evaluate import evaluate as run
    from .evaluate import named_recipes

    drawn = whole_numbers(seeds, "seeds", 0)
    recipes = named_recipes([name.strip() for name in recipe.split(",")])
    loaded, tokenizer = load_model(model, dtype)
    given = None if calibration is None else Calibration.load(calibration, loaded)
    if given is not None and given.learned:
        recipes["learned"] = given.learned_recipe()
    calib_ids = None if calib_text is None else encode_text(tokenizer, calib_text)[:65536]
    rows = run(
        loaded,
        encode_text(tokenizer, content),
        recipes,
        windows,
        window,
        calib_ids,
        protocol,
        not quiet,
        offset_tokens,
        drawn,
        greedy,
        needles,
        given,
    )
    report(f"{model}, {windows} windows of {window}, {dtype}, {protocol}", rows, json_file, {"seeds": drawn})


@app.command()
@reports_errors
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write (safetensors).")],
    model: ModelName = "tiny-qwen",
    text: Annotated[Path | None, typer.Option(help="Calibration text; default: sampled from the model.")] = None,
    recipe: Annotated[str, typer.Option(help="Whose rotation and offset lambda is for.")] = "paper-g32-lambda",
    tokens: Annotated[int, typer.Option(help="Tokens used.", min=16)] = 8192,
    learn: Annotated[
        str | None, typer.Option(help="lambda, cayley or householder: learn these instead of measuring lambda.")
    ] = None,
    loss: Annotated[str, typer.Option(help="Of learning: attention or mse.")] = "attention",
    base: Annotated[str, typer.Option(help="Under a learned rotation: srft or identity.")] = "srft",
    reflectors: Annotated[int, typer.Option(help="Of householder; 0: half the head.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Of Adam, for each layer and side.", min=1)] = 200,
    seed: Seed = 0,
    quiet: Quiet = False,
):
    """Collects the offsets and lambda of a model once, for caches to start from; or learns lambda and rotations.

    Without --learn, one forward pass: lambda = 1 / max of each rotated channel. With it, Adam through the quantiser of
    --recipe, K and V apart, layer by layer, on the squared error of attention's scores and outputs (or, with mse, of K
    and V). What is finished is kept in OUT.progress until the end, and found there when the command is run again.

    Example: `halfbyte calibrate --model tiny-qwen --text book.txt --recipe default --learn cayley -o qwen.safetensors`
    """
    begin(out, "out")
    from .recipes import get_recipe

    chosen = get_recipe(recipe)
    from .calibrate import calibrate as run
    from .calibrate import sample_text
    from .learn import Plan
    from .learn import learn as run_learning
    from .models import encode_text, load_model, read_text

    plan = Plan(learn, loss, base, reflectors, steps, seed) if learn else None
    content = None if text is None else read_text(text)
    loaded, tokenizer = load_model(model)
    ids = sample_text(loaded, tokens, seed, not quiet) if content is None else encode_text(tokenizer, content)[:tokens]
    if plan is not None:
        result = run_learning(loaded, ids, chosen, plan, progress=not quiet, resume=f"{out}.progress")
        result.seed = seed if content is None else None
    else:
        result = run(loaded, ids, progress=not quiet, recipe=chosen, seed=seed if content is None else None)
    result.save(out)
    print(f"wrote {out}: {len(result.lambda_k)} layers from {result.tokens} tokens, model {result.model}")
    for place, (before, after) in result.learned.get("losses", {}).items():
        print(f"  layer {place}: loss {before:.3g} -> {after:.3g}")


@app.command()
@reports_errors
def reproduce(
    text: Annotated[Path, typer.Option(help="A UTF-8 text file to measure on.")],
    model: ModelName = "tiny-qwen",
    table: Annotated[
        str, typer.Option(help="rotation, ladder, hook, seeds, ablation, layers, learned, memory; all: every one.")
    ] = "all",
    calib: Annotated[Path | None, typer.Option(help="Another text, for lambda and for learning.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of the text, from its start.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Of the calibration text.", min=512)] = 8192,
    steps: Annotated[int, typer.Option(help="Of learning, for each layer and side.", min=1)] = 200,
    json_file: JsonFile = None,
    quiet: Quiet = False,
):
    """The tables of arXiv 2605.05699 on a model at hand, each line beside the paper's figure, and an ablation of ours.

    The protocol differs from the paper's in three ways: other models (its figures are for the models named beside
    them), the KL of every token with everything packed as the measure that ranks, and lambda calibrated on text that
    is never the one measured on.

    Example: `halfbyte reproduce --model tiny-qwen --text book.txt --calib other.txt --table ladder,seeds`
    """
    begin(json_file)
    from .models import encode_text, load_model, read_text

    content, calib_text = read_text(text), None if calib is None else read_text(calib, "calib")
    from .reproduce import ALL_TABLES
    from .reproduce import reproduce as run

    names = list(ALL_TABLES) if table == "all" else [name.strip() for name in table.split(",")]
    loaded, tokenizer = load_model(model)
    calib_ids = None if calib_text is None else encode_text(tokenizer, calib_text)[:tokens]
    ids = encode_text(tokenizer, content)
    rows = run(loaded, ids, names, windows, window, calib_ids, steps, not quiet)
    for name in names:
        shown = [row for row in rows if row["table"] == name]
        used = [key for key in shown[0] if key != "table" and any(row[key] not in (None, "") for row in shown)]
        report(f"{name}, {model}", [{key: row[key] for key in used} for row in shown], None, {})
    if json_file is not None:
        from .results import command_line, write_json

        write_json(json_file, rows, command_line(), seeds={"seed": 0})


@app.command("report")
@reports_errors
def write_page(
    files: Annotated[list[Path], typer.Argument(help="What --json of eval, reproduce and bench generate wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML page to write.")] = Path("report.html"),
):
    """One self-contained page, for light and dark screens: plots of what was measured, then the tables.

    Example: `halfbyte report eval.json reproduce.json generate.json -o report.html`
    """
    begin(out, "out")
    from .report import write_report

    print(f"wrote {out}: {write_report(files, out)} sections")


@app.command()
@reports_errors
def doctor(json_file: JsonFile = None, seed: Seed = 0, quiet: Quiet = False):
    """What this processor has, what was built, and a ten-second self-test; exit status 1 when it fails.

    Example: `halfbyte doctor --json doctor.json`
    """
    begin(json_file)
    from .doctor import installation, self_test
    from .results import command_line, print_table, write_json

    facts = installation()
    print_table("installation", facts)
    rows = self_test(seed, not quiet)
    print_table(f"self-test, seed {seed}", rows)
    if json_file is not None:
        write_json(json_file, rows, command_line(), seeds={"seed": seed}, installation=facts)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
