"""The command `halfbyte` and all its own commands; nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_bench import bench
from .cli_tools import (
    BYTES_RATIO,
    Dtype,
    JsonFile,
    ModelName,
    Quiet,
    Seed,
    begin,
    report,
    reports_errors,
    whole_numbers,
)

HELP = "A key-value cache in 4 bits, and attention directly on its codes."
app = typer.Typer(
    name="halfbyte",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    if version:
        from . import _native

        print(f"halfbyte {_native.version} ({_native.commit})")
        raise typer.Exit()


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
            BYTES_RATIO,
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


@app.command()
@reports_errors
def recipes(
    head_dim: Annotated[int, typer.Option(help="Channels of a head, for the bits.", min=16)] = 128,
    json_file: JsonFile = None,
):
    """Every recipe and codec by name, its bits a value, and whether it has kernels or is simulated by `eval` alone.

    Kernels exist for 4 and 8 bits. Widths of 2, 3 and 6 bits, tables of uneven levels and all codecs of others are
    simulated: `eval` measures what they would lose, and Int4Cache does not take them.

    Example: `halfbyte recipes --head-dim 64`
    """
    begin(json_file)
    from .simulated import listing

    report(f"recipes, heads of {head_dim}", listing(head_dim), json_file, {})


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
    fp, default, turning, no-sinks, no-offset, paper-per-token, paper-g32, paper-g32-lambda, g32, vector, g16, k8v4;
    simulated, as there are no kernels: k2v2, k3v3, k4v3, k6v6, table, turning-table; codecs of others, simulated: q4_0,
    q4_0-hadamard, quanto-int4, hqq-int4, kivi-4-g64, turboquant-4, kvarn-4, nvfp4, fp8-e4m3. `halfbyte recipes` lists
    all.

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
    names = [name.strip() for name in recipe.split(",")]
    recipes = named_recipes([name for name in names if calibration is None or name != "learned"])  # it is added below
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
    offsets: Annotated[
        bool, typer.Option("--offsets", help="Give caches the text's offsets, instead of their own prompt's.")
    ] = False,
    seed: Seed = 0,
    quiet: Quiet = False,
):
    """Collects lambda of a model once, for caches to start from; or learns lambda and rotations.

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
        result = run_learning(loaded, ids, chosen, plan, progress=not quiet, resume=f"{out}.progress", offsets=offsets)
        result.seed = seed if content is None else None
    else:
        drawn = seed if content is None else None
        result = run(loaded, ids, progress=not quiet, recipe=chosen, seed=drawn, offsets=offsets)
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
        str,
        typer.Option(help="rotation, ladder, hook, seeds, ablation, offsets, layers, learned, memory; all: every one."),
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
    plots: Annotated[
        Path | None, typer.Option(help="Also draw PNG files into this folder (needs matplotlib).", file_okay=False)
    ] = None,
):
    """One self-contained page, for light and dark screens: plots of what was measured, then the tables.

    With --plots, pareto.png, ladder.png, layers.png, time.png and memory.png as well, as far as the files have them.

    Example: `halfbyte report eval.json reproduce.json generate.json -o report.html --plots pictures`
    """
    begin(out, "out")
    from .report import write_report

    if plots is not None:
        from .report_plots import write_plots

        print(f"drew {', '.join(write_plots(files, plots))} in {plots}")
    print(f"wrote {out}: {write_report(files, out)} sections")


@app.command()
@reports_errors
def doctor(
    device: Annotated[str, typer.Option(help="cpu, or mps: an Apple GPU, through PyTorch.")] = "cpu",
    predict: Annotated[
        bool, typer.Option("--predict", help="With --device mps: what a model of Apple's GPUs expects; runs nothing.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="With --device mps: generate is timed with it (a folder, a hub id, tiny-qwen, …).")
    ] = "tiny-qwen",
    prefix: Annotated[str, typer.Option(help="With --device mps: prompt lengths of that.")] = "256,1024,2048,4096",
    json_file: JsonFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
):
    """What this processor has, what was built, and a ten-second self-test; exit status 1 when it fails.

    With --device mps, for owners of Macs: compiles the Metal kernels, holds each against the CPU's definition, times
    packing and generate by the source paper's protocols, and writes a file to send in.

    Example: `halfbyte doctor --json doctor.json`, or `halfbyte doctor --device mps --json result.json`
    """
    begin(json_file)
    if device not in ("cpu", "mps"):
        raise ValueError(f"device: got {device!r}; takes cpu or mps")
    if predict and device != "mps":
        raise ValueError("predict: only Apple's GPUs are predicted; takes --device mps")
    if predict:
        return show_predictions(json_file)
    if device == "mps":
        return doctor_of_mac(model, whole_numbers(prefix, "prefix", 16), json_file, seed, not quiet)
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


def doctor_of_mac(model, prefixes, json_file, seed, progress) -> None:
    """Checks and benches on an Apple GPU; exit status 1 when a check fails, after the benches."""
    from . import doctor_mps
    from .mps_kernels import library
    from .results import print_table

    library()
    facts = doctor_mps.device_facts()
    print_table("machine", facts)
    checks = doctor_mps.check_device("mps", seed=seed, progress=progress)
    print_table(f"kernels against the definition, seed {seed}", checks)
    encode = doctor_mps.bench_encode("mps", progress=progress)
    print_table(f"packing {doctor_mps.BENCH_VECTORS:,} vectors", encode, "paper: arXiv 2605.05699, on an M1 of 8 cores")
    attend = doctor_mps.bench_attend("mps", progress=progress)
    note = "predicted: docs/metal.md, for an M1 of 8 cores"
    print_table(f"attention, one query over {doctor_mps.ATTENDED_TOKENS:,} packed tokens", attend, note)
    generate = doctor_mps.bench_generate("mps", model, prefixes, seed=seed, progress=progress)
    print_table("generate, float16", [row for row in generate if "error" not in row] or generate)
    if json_file is not None:
        benches = {"encode": encode, "attend": attend, "generate": generate}
        doctor_mps.write_result(json_file, facts, checks, benches)
        print(f"\nwrote {json_file}: please send it in with an issue")
    if not all(row["ok"] for row in checks):
        raise typer.Exit(1)


def show_predictions(json_file) -> None:
    """What `halfbyte.metal_model` expects of Apple GPUs."""
    from . import metal_model
    from .results import command_line, print_table, write_json

    kernels, attention = metal_model.predict_encode(), metal_model.predict_attend()
    generation = metal_model.predict_generate()
    note = "Predictions of a model, not measurements: nothing has run on Apple hardware yet. See docs/metal.md."
    print_table("packing a vector, predicted", metal_model.table(kernels, "ns"), note)
    print_table("attention, a token of a KV head, predicted", metal_model.table(attention, "ns"), note)
    shown = [row for row in generation if row["chip"] in ("M1", "M4 Max")]
    print_table("generate: least time a token, predicted, beside the source paper's measurements", shown, note)
    if json_file is not None:
        rows = {"encode": kernels, "attend": attention, "generate": generation}
        write_json(json_file, [row | {"table": name} for name in rows for row in rows[name]], command_line(),
                   prediction=True)  # fmt: skip


if __name__ == "__main__":
    app()
