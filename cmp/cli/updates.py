"""The commands `update` and `tune`, which keep a model current month by month."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmp.cli import shared
from cmp.errors import CmpError
from cmp.parsing import read_yaml

if TYPE_CHECKING:
    from cmp.releases.update_plan import UpdatePlan
    from cmp.runs.runner import Observer

Chosen = Annotated[Path | None, typer.Option("--settings", metavar="FILE")]
Folders = Annotated[list[Path] | None, typer.Option("--retain", metavar="FOLDER")]
Gone = Literal["refuse", "skip"]
Moved = Annotated[list[str] | None, typer.Option("--moved", metavar="OLD=NEW")]
Prompt = Annotated[str | None, typer.Option(metavar="TEMPLATE")]
Start = Annotated[str | None, typer.Argument(metavar="RELEASE")]


def update(
    parent: Start = None,
    settings: shared.Settings = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FOLDER")] = None,
    start: str | None = None,
    pool: str | None = None,
    retain: Folders = None,
    prompt: Prompt = None,
    chosen: Chosen = None,
    name: str | None = None,
    gone: Gone = "refuse",
    moved: Moved = None,
    threads: shared.Threads = 1,
    dry_run: bool = False,
    device: str | None = None,
    micro_batch: shared.OptionalPositive = None,
    checkpoint_activations: bool = False,
    compile: bool = False,
    tensorboard: Path | None = None,
    wandb: str | None = None,
) -> None:
    """Update a model with a folder of new images, and write a release.

    Give the model of the first update with --start; every later update starts from a RELEASE. The
    book's recipe is the default. Repeat the command to continue a stopped update.
    `torchrun -m cmp -- update ...` splits each batch between processes.

    Args:
        parent: The release to start from.
        data: The folder of the new images: one folder per class, a table, tars, or manifests.
        out: The folder of the new release.
        start: The model of the first update: NAME:START, such as ViT-B-16:laion2b_s34b_b88k, where
            START is a tag or a file of weights; hf-hub:ORG/NAME; local-dir:FOLDER; or small.
        pool: A folder of images like those of pretraining, to replay in this and all later updates.
            It replaces an earlier pool. The first update also takes `embedded`, this book's pool,
            with this book's own scored sets. Default: none.
        retain: A folder of images not to be forgotten, scored as A_ZS from this update on, besides
            earlier ones; repeat for more. Each is a set, named after the folder. Default: none.
        prompt: For the first update: how a class is named in a folder without a manifest, such as
            "a photo of a {}". Default: "{}" for this book's own models, and otherwise that example.
        chosen: A file of settings, such as one written by `cmpt tune`. Default: none.
        name: Name of the update. Default: the folder's name.
        gone: If images of earlier updates are missing: refuse, or skip them for good; changed files
            count as missing.
        moved: A folder of earlier images that has moved, as OLD=NEW; repeat for others.
            Default: none.
        tensorboard: Write TensorBoard files to this folder, in addition to the log. Default: none.
        wandb: Log to this project of Weights & Biases, in addition to the log. Default: none.

    Example:
        cmpt update releases/2026-01 --data pictures/2026-02 -o releases/2026-02
    """
    if out is None:
        raise CmpError("-o: give the folder of the new release")
    import torch
    from tqdm import tqdm

    from cmp.cli.computing import forecast_lines, progress_observer, release_lines
    from cmp.releases import release
    from cmp.releases.update import check_folder, check_room, compute_update, update_device
    from cmp.releases.update_plan import plan_update
    from cmp.scale import devices, processes
    from cmp.scale.execution import ExecutionConfig

    torch.set_num_threads(threads)
    given = _given(parent, start, data, settings, chosen)
    execution = ExecutionConfig(micro_batch, checkpoint_activations, compile)
    pictures: dict[str, Any] = {
        "pool": pool, "retain": retain or [], "name": name or "", "prompt": prompt or "",
        "skip_gone": gone == "skip", "moved": parse_moved(moved, given[0]),
    }  # fmt: skip
    with processes.init_distributed(update_device(given[0], device)) as local_device:
        is_first = processes.rank() == 0
        with processes.first_process_first():
            plan = plan_update(*given, **pictures)
        check_folder(plan, out)
        if is_first:
            origin = release.describe(plan.parent) if plan.parent else "a first update"
            typer.echo("\n".join([f"from {given[0]}: {origin}", *plan.notes]))
        if dry_run:
            if is_first:
                typer.echo("\n".join(forecast_lines(plan, local_device, execution)))
                if not release.is_release(out):
                    typer.echo(f"disk: {check_room(plan, out)}")
                typer.echo("nothing was computed")
            return
        devices.check_device(local_device)
        is_there = release.is_release(out)
        boards = shared.name_boards(tensorboard, wandb)
        with tqdm(total=plan.steps, desc=plan.name, unit=" steps", disable=not is_first) as bar:
            observer = progress_observer(bar)
            made = compute_update(plan, out, observer, local_device, execution, boards)
        if is_first:
            state = "already there" if is_there else "written"
            typer.echo(f"{state}: {out}\n{release_lines(made)}")
            if not plan.peak_source:
                typer.echo(
                    f"its peak, {plan.config.schedule.peak:g}, is the recipe's, not tuned for "
                    f"your images; before the next update, run cmpt tune {shlex.quote(str(out))} "
                    "--data FOLDER_OF_NEXT_MONTH -o tuned.yaml"
                )


def _given(
    parent: str | None,
    start: str | None,
    data: Path | None,
    settings: list[str] | None,
    chosen: Path | None,
) -> tuple[str, Path, dict[str, Any]]:
    """Return the start, the data and the settings of an update from a command's arguments."""
    from cmp import config
    from cmp.releases import release

    settings, parent = list(settings or []), parent and os.path.expanduser(parent)
    if parent and "=" in parent and not Path(parent).exists():
        settings, parent = [parent, *settings], None  # a first update's setting
    if (parent is None) == (start is None):
        raise CmpError(
            "give the RELEASE to start from or, for the first update, the model with --start, "
            "such as --start ViT-B-16:laion2b_s34b_b88k"
        )
    if parent is not None and not release.is_release(Path(parent)):
        raise CmpError(
            f"{parent}: must be the folder of a release, with its {release.RECORD_FILE}; give the "
            "model of a first update with --start"
        )
    if data is None:
        raise CmpError("--data: give the folder of the new images")
    below = read_yaml(chosen) if chosen else {}
    return parent or str(start), data, config.override(below, settings)


def parse_moved(moved: list[str] | None, start: str | Path) -> dict[str, str]:
    """Return the new folders by the old ones.

    Args:
        moved: Texts OLD=NEW. If a folder has a "=" in its name, OLD is one that images came from.
        start: The release whose images have moved, or something else.

    Raises:
        CmpError: A text has another form, or an old folder is given twice.
    """
    from cmp.releases import release

    folders: list[str] = []
    if moved and release.is_release(Path(start)):
        folders = [arrival.folder for arrival in release.read_release(start).record.arrivals]
    pairs = [_split_moved(text, folders) for text in moved or []]
    olds = [old for old, _ in pairs]
    if twice := [old for old in olds if olds.count(old) > 1]:
        raise CmpError(f"--moved: {twice[0]!r} is given twice; give each old folder once")
    return dict(pairs)


def _split_moved(text: str, folders: list[str]) -> tuple[str, str]:
    from cmp.releases.ledger import came_from

    parts = text.split("=")
    pairs = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        raise CmpError(f"--moved: {text!r}: give OLD=NEW, two folders")
    known = [pair for pair in pairs if any(came_from(folder, pair[0]) for folder in folders)]
    return (known or pairs)[0]


def tune(
    parent: Start = None,
    settings: shared.Settings = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE")] = None,
    start: str | None = None,
    pool: str | None = None,
    retain: Folders = None,
    prompt: Prompt = None,
    chosen: Chosen = None,
    gone: Gone = "refuse",
    moved: Moved = None,
    peaks: Annotated[str | None, typer.Option(metavar="PEAK,...")] = None,
    threads: shared.Threads = 1,
    device: str | None = None,
    micro_batch: shared.OptionalPositive = None,
    checkpoint_activations: bool = False,
    compile: bool = False,
) -> None:
    """Tune the peak learning rate of an update on held-out validation images.

    Three peaks are tried, a factor of three apart, and more if the best is the lowest or the
    highest. Repeat the command to continue a stopped run. Give the result, which contains your
    settings and the best peak, to `cmpt update --settings FILE`. `torchrun -m cmp -- tune ...`
    splits each batch between processes.

    Args:
        parent: The release that the update starts from.
        data: The folder of the new images.
        out: The file for the result, NAME.yaml. Only a file from `cmpt tune` is replaced.
        start: The model of the first update, as for `cmpt update`.
        pool: As for `cmpt update`. Default: none.
        retain: As for `cmpt update`. Default: none.
        prompt: As for `cmpt update`, with the same default.
        chosen: A file of settings, such as your team's. Default: none.
        gone: As for `cmpt update`.
        moved: As for `cmpt update`.
        peaks: The first peaks to try. Default: the update's own, a third of it, and three times as
            much.

    Example:
        cmpt tune releases/2026-01 --data pictures/2026-02 -o tuned.yaml
    """
    import torch
    from tqdm import tqdm

    from cmp.cli.computing import progress_observer
    from cmp.releases import tuning
    from cmp.releases.update import update_device
    from cmp.scale import processes
    from cmp.scale.execution import ExecutionConfig

    if out is None or out.suffix != ".yaml":
        raise CmpError("-o: give the file for the result, NAME.yaml")
    shared.check_out(out)
    tuning.check_choice(out)
    torch.set_num_threads(threads)
    first, folder, tree = _given(parent, start, data, settings, chosen)
    execution = ExecutionConfig(micro_batch, checkpoint_activations, compile)
    tried: list[UpdatePlan] = []
    with processes.init_distributed(update_device(first, device)) as local_device:
        is_first = processes.rank() == 0
        with tqdm(unit=" steps", disable=not is_first) as bar:

            def begin(plan: "UpdatePlan") -> "Observer":
                tried.append(plan)
                bar.reset(plan.steps)
                bar.set_description(f"peak {plan.config.schedule.peak:g}")
                return progress_observer(bar)

            table = tuning.tune(
                first, folder, tree, folder=out.with_name(f".{out.stem}.tune"),
                peaks=_parse_peaks(peaks), device=local_device, execution=execution,
                observer=begin, on_row=lambda row: is_first and bar.write(_score_line(row)),
                pool=pool, retain=retain or [], prompt=prompt or "", skip_gone=gone == "skip",
                moved=parse_moved(moved, first),
            )  # fmt: skip
    if is_first:
        peak = tuning.write_choice(table, out, tree)
        typer.echo(f"best on validation: {peak:g}; written: {out}")
        typer.echo(tuning.describe_evidence(tried[-1]))
        typer.echo(
            "next: the same command with `update` for `tune`, without --peaks and KEY=VALUE, with "
            f"--settings {shlex.quote(str(out))} and -o NEW_RELEASE"
        )


def _parse_peaks(text: str | None) -> list[float]:
    try:
        peaks = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise CmpError(f"--peaks: {text!r}: give numbers, such as 0.001,0.003") from error
    if any(not 0 < peak < 1e3 for peak in peaks):
        raise CmpError(f"--peaks: {text!r}: peaks must be between 0 and 1000")
    return peaks


def _score_line(row: Any) -> str:
    from cmp.releases import tuning

    scores = ", ".join(f"{name} {row[name]:.1f}" for name in tuning.SCORES if name in row)
    return f"peak {row['peak']:g}: {scores or 'training diverged'}"
