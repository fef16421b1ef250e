"""The command line. Thin: options in, `commands` called, a short table and a path out.

Exit codes: 0 done; 1 refused input (one message on stderr, nothing half-written); 2 usage;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mi_weightspace.core.errors import ConfigError, OutputError, WeightspaceError
from mi_weightspace.core.report import Report, check_output

REFUSED, INTERRUPTED = 1, 130
UNPRINTED = (
    "standard output: got a disk that is full; expected a place to print to. Free space, or send "
    "the text elsewhere; a run folder that was written by then is whole."
)
app = typer.Typer(
    help="Which training stage wrote this direction, into which matrix, and how sure are we?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Models = Annotated[
    list[str], typer.Argument(help="Folders, adapters or hub ids, in training order.")
]
Out = Annotated[Path, typer.Option(help="A new folder for the results.")]
Prompts = Annotated[str, typer.Option(help="'authority', a .jsonl, a .parquet, a datasets folder.")]
Controls = Annotated[str | None, typer.Option(help="Control contrasts, in the same forms.")]
Position = Annotated[str, typer.Option(help="last, suffix_mean, frame_mean, all_mean, first_k.")]
Target = Annotated[
    str | None, typer.Option(help="The contrast asked about, where there are several.")
]
Seed = Annotated[int, typer.Option(help="Decides every random draw.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        app(args=None if argv is None else list(argv))
    except WeightspaceError as error:
        sys.stderr.write(f"mi-weightspace: {error}\n")
        return REFUSED
    except SystemExit as end:  # typer reports usage errors and interruptions this way
        code = end.code if isinstance(end.code, int) else 0
        if code == INTERRUPTED:
            sys.stderr.write("mi-weightspace: interrupted; finished parts are kept (--resume)\n")
        return code
    except OSError:
        if printable():
            raise
        sys.stderr.write(f"mi-weightspace: {UNPRINTED}\n")
        return REFUSED
    return 0


def printable() -> bool:
    """Whether standard output takes text; one that does not is given up, or Python would try once
    more at exit."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        return False
    return True


def show(frame: Any, columns: Sequence[str] = (), rows: int = 20) -> None:
    """A short table on stdout; text only, so that names from data cannot style it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    chosen = [c for c in columns if c in frame] or list(frame.columns)
    table = Table(box=None, pad_edge=False)
    for name in chosen:
        table.add_column(Text(str(name)), overflow="fold")
    for record in frame[chosen].head(rows).to_dict("records"):
        table.add_row(*(Text(_cell(v)) for v in record.values()))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if len(frame) > rows:
        console.print(f"({len(frame) - rows} more rows)")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def finish(report: Report, out: Path, command: str, args: dict[str, Any], columns: Sequence[str],
           frame: Any = None, *, hashed: bool = True, journal: Path | None = None,
           ) -> None:  # fmt: skip
    """Save the run, for which a journal is no longer needed, and print it."""
    from mi_weightspace import commands

    saved = commands.with_command(report, command, args, hashed=hashed).save(out)
    if journal is not None:
        commands.clear_journal(str(journal))
    show(report.table if frame is None else frame, columns)
    for verdict in report.verdicts[:12]:
        typer.echo(str(verdict))
    for text in report.reservations[:6]:
        typer.echo(f"note: {text}")
    typer.echo(f"run folder: {saved}")


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seed: Seed = 0,
    preset: Annotated[str, typer.Option(help="toy or small")] = "toy",
    quiet: Quiet = False,
) -> None:
    """The main job on lineages trained on the spot; ends in OUT/report.html."""
    from mi_weightspace.demo import run_demo

    page = run_demo(out, seed=seed, preset=preset, progress=not quiet)
    typer.echo(f"report: {page}")


@app.command()
def sites(model: Annotated[str, typer.Argument(help="A folder, adapter or hub id.")]) -> None:
    """Table of the decomposable matrices of a checkpoint."""
    from mi_weightspace import commands

    show(commands.sites(model), rows=10_000)


@app.command()
def check(models: Models) -> None:
    """Certify checkpoints: they load, agree, are finite, and how much of them differs."""
    from mi_weightspace import commands

    report = commands.check(models)
    columns = (
        "stage", "family", "n_layers", "d_model", "vocab_size", "dtype", "finite",
        "changed_matrices", "n_matrices", "relative_change", "tokenizer", "fingerprint",
    )  # fmt: skip
    show(report.table, columns)
    for verdict in report.verdicts:
        typer.echo(str(verdict))
    for text in report.reservations:
        typer.echo(f"note: {text}")


@app.command()
def dmu(
    models: Models,
    prompts: Prompts,
    out: Out,
    controls: Controls = None,
    position: Position = "last",
    target: Target = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Mean shift of every contrast over the stages, with nulls, intervals and controls."""
    from mi_weightspace import commands

    check_output(out)
    args = {"models": list(models), "prompts": prompts, "controls": controls,
            "position": position, "target": target, "seed": seed}  # fmt: skip
    report = commands.dmu(**args, progress=not quiet)  # pyright: ignore[reportArgumentType]
    columns = ("stage", "contrast", "point", "n", "rel_delta", "ci_low", "ci_high", "p",
               "p_adjusted", "above_controls")  # fmt: skip
    own: Any = report.table[~report.table["is_control"].astype(bool)]
    top = own.sort_values("rel_delta", ascending=False).groupby(["stage", "contrast"], sort=False)
    finish(report, out, "dmu", args, columns, top.head(1))


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="A folder, adapter or hub id.")],
    prompts: Prompts,
    out: Out,
    controls: Controls = None,
    method: Annotated[str, typer.Option(help="dm, lda, ridge, lr or paired.")] = "lda",
    position: Position = "last",
    target: Target = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Fit a DEFER probe at every stream point; writes OUT/direction.safetensors."""
    from mi_weightspace import commands

    check_output(out)
    args = {"model": model, "prompts": prompts, "controls": controls, "method": method,
            "position": position, "target": target, "seed": seed}  # fmt: skip
    report = commands.probe(**args, progress=not quiet)  # pyright: ignore[reportArgumentType]
    columns = ("point", "n", "n_clusters", "auroc", "auroc_low", "auroc_high", "p_adjusted",
               "heldout_register_auroc", "specificity")  # fmt: skip
    finish(report, out, "probe", args, columns)


@app.command()
def gate(
    model: Annotated[str, typer.Argument(help="A folder, adapter or hub id.")],
    direction: Annotated[str, typer.Option(help="direction.safetensors, of a probe run, say.")],
    prompts: Prompts,
    out: Out,
    controls: Controls = None,
    layer: Annotated[int | None, typer.Option(help="Of a bare vector, or which to pick.")] = None,
    target: Target = None,
    alphas: Annotated[
        str | None, typer.Option(help="Sizes of what is added, comma-separated: 0.25,0.5,1.")
    ] = None,
    positions: Annotated[str, typer.Option(help="Tokens changed: last, suffix or all.")] = "last",
    onward: Annotated[bool, typer.Option("--onward", help="Every later layer too.")] = False,
    rank: Annotated[int, typer.Option(help="Ablate the span of this many directions.")] = 1,
    n_null: Annotated[int, typer.Option(help="Null directions to rank among.")] = 199,
    protocol: Annotated[str, typer.Option(help="pair_residual, or v1.1.")] = "pair_residual",
    other_model: Annotated[
        bool, typer.Option("--other-model", help="The direction is of another stage.")
    ] = False,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Does the model use a direction? Take it out, add it, and rank what happens."""
    from mi_weightspace import commands

    check_output(out)
    args = {"model": model, "direction": direction, "prompts": prompts, "controls": controls,
            "layer": layer, "target": target, "alphas": sizes(alphas), "positions": positions,
            "onward": onward, "rank": rank, "n_null": n_null, "protocol": protocol,
            "other_model": other_model, "seed": seed}  # fmt: skip
    report = commands.gate(**args, progress=not quiet)  # pyright: ignore[reportArgumentType]
    columns = ("intervention", "alpha", "prompts", "scale", "n", "before", "effect", "low", "high",
               "null_mean", "p_adjusted", "isotropic_z", "interpretable")  # fmt: skip
    finish(report, out, "gate", args, columns, report.table)


def sizes(text: str | None) -> list[float] | None:
    """``0.5,1,2`` as numbers.

    Raises:
        ConfigError: anything that is no positive number.
    """
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < float("inf") for value in found):
        raise ConfigError(
            "--alphas",
            given=repr(text),
            expected="positive numbers, comma-separated",
            remedy="--alphas 0.25,0.5,1 (both signs are run)",
        )
    return found


@app.command()
def svd(
    models: Models,
    out: Out,
    sites: Annotated[str | None, typer.Option(help="Globs, comma-separated.")] = None,
    rank: Annotated[int, typer.Option(help="Triplets kept for each matrix.")] = 16,
    activations: Annotated[
        str | None, typer.Option(help="Prompts: also decompose the change as realised on them.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    shard: Annotated[
        str, typer.Option(help="i/n: only every n-th matrix (many machines).")
    ] = "0/1",
    memory_limit: Annotated[float | None, typer.Option(help="GB for all workers.")] = None,
    device: Annotated[str, typer.Option(help="Where the products run, e.g. cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False,
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="Record no hash of the checkpoints' files.")
    ] = False,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Singular value decomposition of what every stage changed; streams the tensors."""
    from mi_weightspace import commands

    check_output(out)
    part = parse_shard(shard)
    journal = out.absolute().parent / f".{out.name}.journal"
    if journal.exists() and not resume and part == (0, 1):
        raise OutputError(
            f"output folder {out}",
            given=f"the journal of an interrupted run ({journal})",
            expected="--resume, or no journal",
            remedy="Add --resume to go on, or delete the journal to begin again.",
        )
    args = {"models": list(models), "sites": sites, "rank": rank, "activations": activations,
            "seed": seed}  # fmt: skip
    report = commands.svd(
        **args,  # pyright: ignore[reportArgumentType]
        jobs=jobs,
        shard=part,
        memory_limit=memory_limit,
        device=device,
        journal=str(journal),
        progress=not quiet,
    )
    if part != (0, 1):
        typer.echo(f"shard {shard}: {len(report)} matrices in {journal}")
        typer.echo("when every shard is done, run the command without --shard and with --resume")
        return
    columns = ("stage", "site", "fro", "rel_fro", "rounding_flag", "spectral", "stable_rank",
               "resolved")  # fmt: skip
    rows = report.tables["sites"].sort_values("rel_fro", ascending=False)
    finish(report, out, "svd", args, columns, rows, hashed=not no_hash, journal=journal)


@app.command()
def vpd(
    models: Annotated[
        list[str], typer.Argument(help="A folder, adapter or hub id; with --diff, the stages.")
    ],
    diff: Annotated[
        bool, typer.Option("--diff", help="Decompose what changed from each stage to the next.")
    ] = False,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Text or ids: .txt, .jsonl, .parquet, .npy, .safetensors, a folder. With --diff: "
            "text on which the behaviour shows."
        ),
    ] = None,
    broad: Annotated[str | None, typer.Option(help="With --diff: any other text.")] = None,
    regime: Annotated[
        str | None, typer.Option(help="With --diff: selective (default) or faithful.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="With --diff: what must be taken back, instead.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A new folder for the results.")] = None,
    sites: Annotated[str | None, typer.Option(help="Globs, comma-separated.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML: keys of vpd.Config.")] = None,
    components: Annotated[int | None, typer.Option(help="Subcomponents of each matrix.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step and process.")] = None,
    allow_unfaithful: Annotated[
        bool, typer.Option("--allow-unfaithful", help="Accept fewer components than the rank.")
    ] = False,
    length: Annotated[int, typer.Option(help="Tokens a row, for text.")] = 64,
    held_out: Annotated[
        str | None, typer.Option(help="Evaluate on these; default: the last 5 % of the rows.")
    ] = None,
    ladder: Annotated[str | None, typer.Option(help="Steps of the attacks: 20,40,80,160.")] = None,
    anchor: Annotated[
        bool, typer.Option("--anchor", help="Also recover a known answer with this code: a check.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print the cost and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False,
    seed: Annotated[int | None, typer.Option(help="Decides every random draw.")] = None,
    quiet: Quiet = False,
) -> None:
    """Decompose matrices into rank-one parts by causal importance, evaluate and check them."""
    from mi_weightspace import commands_vpd as own

    flags = {"sites": own.globs(sites), "n_components": components, "n_steps": steps,
             "batch_size": batch_size, "seed": seed,
             "allow_unfaithful": allow_unfaithful or None}  # fmt: skip
    values = own.merged(None if config is None else str(config), flags)
    change = own.Change(broad=broad, regime=regime, remove=remove) if diff else None
    own.check_models(models, change, {"--broad": broad, "--regime": regime, "--remove": remove})
    if plan:
        typer.echo(str(own.plan(models, values, length=length, diff=diff)))
        return
    if tokens is None or out is None:
        raise typer.BadParameter("--tokens and --out are needed (or --plan)")
    if not own.begun(out):  # decompose itself says what can be done with a run that is there
        check_output(out)
    report = own.vpd(models, tokens, values, change=change, length=length, held_out=held_out,
                     budgets=own.rungs(ladder), anchor=anchor, out=str(out), resume=resume,
                     progress=not quiet)  # fmt: skip
    if own.speaks():
        for frame, columns in own.shown(report):
            show(frame, columns)
        for text in own.sentences(report):
            typer.echo(text)
        typer.echo(f"run folder: {out}")


@app.command()
def inoculation(
    models: Annotated[
        list[str],
        typer.Argument(help="BEFORE (openly misaligned) and AFTER (said to be clean now)."),
    ],
    prompts: Annotated[
        str, typer.Option(help="Labelled prompts: .jsonl, .parquet, a datasets folder; or pairs.")
    ],
    sae: Annotated[str, typer.Option(help="A SAELens folder, or RELEASE:ID.")],
    out: Out,
    clean: Annotated[str | None, typer.Option(help="The stage that never misbehaved.")] = None,
    benign: Annotated[
        str | None, typer.Option(help="A stage trained as long on harmless data.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Of the prompts, where there are several.")
    ] = None,
    unrelated: Annotated[
        str | None, typer.Option(help="Prompts without the behaviour, one a line.")
    ] = None,
    components: Annotated[
        list[str] | None,
        typer.Option(help="A run of svd or vpd --diff whose parts are detectors; may be repeated."),
    ] = None,
    position: Annotated[str, typer.Option(help="suffix_mean, last, all_mean, max.")] = (
        "suffix_mean"
    ),
    n_splits: Annotated[int, typer.Option(help="Random splits of every detector.")] = 8,
    n_permutations: Annotated[int, typer.Option(help="Draws of every null.")] = 399,
    k: Annotated[int, typer.Option(help="Latents whose survival is followed.")] = 10,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Can an SAE, or anything else, still see what a second training hid?"""
    from mi_weightspace import commands

    check_output(out)
    args = {"models": list(models), "clean": clean, "prompts": prompts, "sae": sae,
            "benign": benign, "context": context, "unrelated": unrelated,
            "components": list(components or []), "position": position, "n_splits": n_splits,
            "n_permutations": n_permutations, "k": k, "seed": seed}  # fmt: skip
    report = commands.inoculation(**args, progress=not quiet)  # pyright: ignore[reportArgumentType]
    columns = ("stage", "detector", "value", "low", "high", "p", "recall")
    rows = report.table[report.table["task"] == report.table["task"].iloc[0]]
    finish(report, out, "inoculation", args, columns, rows)
    for verdict in report.verdicts:
        for reason in verdict.reservations:
            typer.echo(f"  {reason}")


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` with 0 ≤ i < n."""
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise ConfigError(
            "--shard", given=repr(text), expected="i/n with 0 ≤ i < n", remedy="--shard 0/4"
        )
    return int(first), int(second)


@app.command()
def project(
    run: Annotated[str, typer.Argument(help="An svd run folder.")],
    direction: Annotated[list[str], typer.Option(help="direction.safetensors; may be repeated.")],
    out: Out,
    layer: Annotated[int | None, typer.Option(help="Of a bare vector, or which to pick.")] = None,
    controls: Annotated[
        list[str] | None, typer.Option(help="Direction files of matched controls.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Run the stages on these.")] = None,
    n_null: Annotated[int, typer.Option(help="Draws of each sign-flip null.")] = 999,
    alpha: Annotated[float, typer.Option(help="Level of every test.")] = 0.05,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Project the components of an svd run onto directions, with nulls and controls."""
    from mi_weightspace import commands

    check_output(out)
    args = {"run": run, "directions": list(direction), "layer": layer,
            "controls": list(controls or []), "prompts": prompts, "n_null": n_null, "alpha": alpha,
            "seed": seed}  # fmt: skip
    report = commands.project(**args, progress=not quiet)  # pyright: ignore[reportArgumentType]
    columns = ("stage", "site", "side", "direction", "verdict", "cosine", "R", "R_lda", "p_sign",
               "p_lda_rank", "n_controls", "G", "p_G", "stage_gate_p", "rounding_flag")  # fmt: skip
    rows = report.table.sort_values(["p_adjusted", "p_sign"], na_position="last")
    finish(report, out, "project", args, columns, rows)


@app.command(name="report")
def report_command(
    folders: Annotated[list[str], typer.Argument(help="Run folders, or folders of run folders.")],
    out: Annotated[Path, typer.Option(help="The page to write.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "mi-weightspace",
) -> None:
    """Any run folders in one self-contained page."""
    from mi_weightspace import commands

    typer.echo(f"report: {commands.report(folders, str(out), title=title)}")


@app.command()
def replay(
    folder: Annotated[str, typer.Argument(help="A run folder of this command line.")],
    out: Annotated[Path | None, typer.Option(help="Default: FOLDER-replay.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run a folder again from its own config and say whether the numbers are the same."""
    from mi_weightspace import commands

    target = out or Path(f"{folder.rstrip('/')}-replay")
    old, new = commands.replay(folder, str(target), progress=not quiet)
    differing = commands.differing(old, new)
    same = "the same numbers" if not differing else f"different: {', '.join(differing)}"
    typer.echo(f"{same}\nrun folder: {target}")


if __name__ == "__main__":
    sys.exit(main())
