"""`cmpt update`: the next task of a stream without an end.

A planned update (`cmp.releases.update_plan`) is trained by the same loop as a task of a simulated
stream, and written as a release.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import from_numpy
from tqdm.auto import tqdm

from cmp import __version__, models, starts
from cmp.errors import CmpError, explain_errors
from cmp.files import atomic_folder, check_new, delete_leftovers, save_tensors
from cmp.parsing import read_table
from cmp.releases import ledger as ledgers
from cmp.releases import release, sentences
from cmp.releases.arrivals import check_utf8
from cmp.releases.candidates import Candidate, split_start
from cmp.releases.card import release_card
from cmp.releases.compare import Comparison, compare
from cmp.releases.release import Release, ReleaseRecord, UpdateRecord
from cmp.releases.report import write_report
from cmp.releases.update_plan import UpdatePlan, max_rate, plan_update
from cmp.runs.checkpoints import (
    REPORT,
    CheckpointManager,
    Progress,
    checkpoint_files,
    latest_progress,
)
from cmp.runs.logs import RunLog
from cmp.runs.runner import NO_OBSERVER, Observer, RunResult, advance_bar, execute
from cmp.scale import processes
from cmp.scale.devices import check_device
from cmp.scale.execution import ExecutionConfig

STATE_COPIES = 5
"""Copies of the weights in a checkpoint: the network, two moments, and, for merging, the weights at
the start and the running average."""


@contextlib.contextmanager
def update_manager(plan: UpdatePlan, work: Path, device: str) -> Any:
    """Yield the checkpoint manager of an update, or None in all processes but the first; delete its
    checkpoints at the end."""
    if processes.rank():
        yield None
        return
    with CheckpointManager(plan.id, folder=work, in_background=device != "cpu") as manager:
        yield manager
        (work / release.LOG_FILE).unlink(missing_ok=True)  # the release holds it
        manager.remove()


def working_folder(folder: Path) -> Path:
    """Return the folder of the checkpoints while a release is computed."""
    return folder.parent / f".{folder.name}.update"


def find_unfinished(parent: Release) -> Path | None:
    """Return the folder of an unfinished update, beside a release, that may start from it.

    Args:
        parent: The release.
    """
    for work in sorted(parent.folder.absolute().parent.glob(".*.update")):
        progress = latest_progress(work)
        # it does not name its parent, but has one update more
        if not progress or progress.config["stream"]["tasks"] == len(parent.record.updates) + 1:
            return work
    return None


def check_folder(plan: UpdatePlan, folder: Path) -> None:
    """Check that an update can start, and that its release can be written to a folder; or that the
    release is there already.

    Args:
        plan: The update.
        folder: The folder of the release.

    Raises:
        CmpError: It cannot; the message says why.
    """
    check_utf8(str(folder), "--out")
    if release.is_release(folder):
        record = release.read_release(folder).record
        if record.id == plan.id:
            return
        raise CmpError(
            f"{folder}: contains another release{_by_other_version(record.provenance)}, and "
            "releases are never changed; name a new folder"
        )
    plan.check_parent()
    release.refuse_inside(folder, str(folder))
    check_new(folder)
    above = next(each for each in folder.absolute().parents if each.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise CmpError(f"{folder}: cannot be made, since nothing can be written to {above}")
    work = working_folder(folder)
    unfinished = latest_progress(work)
    if unfinished and unfinished.run != plan.id and not _diverged_early(work, unfinished):
        raise CmpError(
            f"{folder}: an update with other images or settings"
            f"{_by_other_version(unfinished.machine)} was stopped here; repeat its command, or "
            f"delete {work}"
        )


def _by_other_version(machine: Mapping[str, Any]) -> str:
    """Return words on the version of this package that computed something, if it is another one:
    the same update may have another id there."""
    made = machine.get("cmp", __version__)
    if made == __version__:
        return ""
    return f" (or the same, by cmp {made}, while this is cmp {__version__}: install cmp {made})"


def _diverged_early(work: Path, unfinished: Progress) -> bool:
    """Return whether an unfinished update diverged and has nothing worth keeping, only the state
    before its first step: it would diverge again, and at a lower peak it is another update."""
    return (unfinished.task, unfinished.step) == (0, 0) and (work / REPORT).exists()


def compute_update(
    plan: UpdatePlan,
    folder: Path,
    observer: Observer = NO_OBSERVER,
    device: str = "cpu",
    execution: ExecutionConfig | None = None,
    boards: Mapping[str, str] | None = None,
) -> Release:
    """Train a planned update and write its release, continuing one that was stopped.

    Args:
        plan: The update.
        folder: The folder of the release.
        observer: Receives the progress, where `resumed` counts only the update's own steps. With
            several processes, it is that of the first.
        device: "cpu" or "cuda".
        execution: How steps are computed.
        boards: By name, a folder for "tensorboard", and a project for "wandb".

    Raises:
        CmpError: The folder already exists, or another process is computing the update.
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the same command continues.
    """
    check_folder(plan, folder)
    delete_leftovers(folder.parent)
    work = working_folder(folder)
    if release.is_release(folder):
        if work.exists():  # killed after it had written the release
            with update_manager(plan, work, device):
                pass  # deletes the checkpoints
        made = release.read_release(folder)
        for fault in made.find_faults().values():  # a copy that broke is not made again
            raise CmpError(f"{fault}; to compute it again, delete {folder} or name another")
        return made
    _check_tensorboard(folder, (boards or {}).get("tensorboard", ""))
    if not processes.rank():
        check_room(plan, folder)
    with update_manager(plan, work, device) as manager:
        [is_written] = processes.all_reduce_max(bool(manager) and release.is_release(folder))
        if is_written:  # by another command, which had the lock until now
            check_folder(plan, folder)
        elif not manager:
            train_update(plan, device, execution)
        else:
            unfinished = latest_progress(work)
            if unfinished and unfinished.run != plan.id and _diverged_early(work, unfinished):
                for path in (*checkpoint_files(work), work / REPORT):  # in this order, if killed
                    path.unlink(missing_ok=True)
                unfinished = None
            if not unfinished:  # the log is that of an update that saved nothing
                (work / release.LOG_FILE).unlink(missing_ok=True)
            with RunLog(work / release.LOG_FILE, plan.id, plan.fitted, device, boards) as log:
                result = train_update(
                    plan, device, execution, log.observe(own_steps(plan, observer)), manager
                )
            manager.finish()  # on a GPU, a thread may still be writing the last state
            assert manager.last is not None  # a finished run has saved its end
            write_release(plan, result, manager.last, folder, device)
    processes.barrier()
    return release.read_release(folder)


def check_room(plan: UpdatePlan, folder: Path, work: Path | None = None) -> str:
    """Check that the disk has room for two checkpoints and two models, less the checkpoints that
    are there if the update was stopped. The release keeps one of each, and shares others.

    Args:
        plan: The update.
        folder: The folder of the release, or of what tuning keeps.
        work: The folder of the checkpoints; if None, `working_folder`.

    Returns:
        How much room it needs, and how much there is.

    Raises:
        CmpError: There is too little.
    """
    network = models.create_on_meta(plan.config.model.name)
    weights = sum(x.nbytes for x in network.state_dict().values())
    work = work or working_folder(folder)
    saved = sum(path.stat().st_size for path in checkpoint_files(work))
    needed = max((2 * STATE_COPIES + 2) * weights - saved, 0)
    place = next(path for path in folder.absolute().parents if path.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise CmpError(
            f"{folder}: the update needs about {needed / 1e9:.2g} GB on this disk, which has "
            f"{free / 1e9:.2g} GB free; make room, or name a folder on another disk"
        )
    return f"about {needed / 1e9:.2g} GB until the release is written, of {free / 1e9:.3g} GB free"


def _check_tensorboard(folder: Path, tensorboard: str) -> None:
    """Raise `CmpError` if TensorBoard would write into the folder of the release, which is written
    whole at the end and never changed."""
    if tensorboard and Path(tensorboard).resolve().is_relative_to(folder.resolve()):
        raise CmpError(
            f"--tensorboard: {tensorboard} is inside {folder}, the folder of the release, which is "
            "written whole at the end; give a folder outside it"
        )


def own_steps(plan: UpdatePlan, observer: Observer) -> Observer:
    """Return an observer whose `resumed` counts only the update's own steps, as a bar does. A log
    counts all steps of the stream."""
    earlier = sum(plan.fitted.steps[:-1])
    return dataclasses.replace(
        observer, resumed=lambda steps: observer.resumed(max(steps - earlier, 0))
    )


def train_update(
    plan: UpdatePlan,
    device: str,
    execution: ExecutionConfig | None,
    observer: Observer = NO_OBSERVER,
    manager: CheckpointManager | None = None,
) -> RunResult:
    """Train a planned update from the state of its parent, see `cmp.runs.runner.execute`.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the same command continues.
    """
    start, model = None, None
    if parent := plan.parent:
        start = parent.state()
        model = models.load_from_file(plan.config.model.name, parent.path(release.START_FILE))
    return execute(
        plan.config, plan.corpus, observer, model, device=device, manager=manager,
        execution=execution, fitted=plan.fitted, start=start,
    )  # fmt: skip


def write_release(
    plan: UpdatePlan,
    result: RunResult,
    state: Path,
    folder: Path,
    device: str,
) -> None:
    """Write a release, whole or not at all.

    Args:
        plan: The update.
        result: The finished training.
        state: The checkpoint at its end.
        folder: The folder of the release.
        device: The device on which models are compared.
    """
    parent = plan.parent
    comparison = compare_with_before(plan, result, device)
    matrix = comparison.updates.reset_index(drop=True).rename(columns={"new": "score"})
    matrix["update"] = [int(label.partition(" ")[0]) for label in matrix["label"]]
    matrix = matrix[["update", "score", "images"]].assign(after=plan.number)
    if parent:
        path = parent.path(release.MATRIX_FILE)
        with explain_errors(f"{path}: cannot be read", release.REMEDY):
            matrix = pd.concat([read_table(path, dict.fromkeys(matrix, float)), matrix])
    # the state was saved before the last scores, whose time only the parent's record counts
    seconds = max(0.0, result.seconds - sum(x.seconds for x in plan.earlier))
    done = UpdateRecord(
        plan.name, plan.id, plan.steps, plan.pools.counts, max_rate(plan.fitted),
        len(plan.pools.update), seconds, plan.is_peak_given,
    )  # fmt: skip
    record = ReleaseRecord(
        release.SCHEMA, plan.id, parent.record.id if parent else "", plan.config.to_dict(),
        (*plan.earlier, done), plan.ledger.arrivals,
        result.provenance, f"state/{state.name}", plan.prompt,
    )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, replace=False) as partial:
        (partial / "state").mkdir()
        release.link_or_copy(state, partial / record.state)
        if parent:
            release.link_or_copy(parent.path(release.START_FILE), partial / release.START_FILE)
        else:
            first = models.load_model(plan.config.model, plan.config.seeds.init)
            models.export_weights(first, partial / release.START_FILE)
        release.write_ledger(plan.ledger, partial / release.LEDGER_FILE)
        if (log := state.with_name(release.LOG_FILE)).exists():
            shutil.copyfile(log, partial / release.LOG_FILE)  # a further run may append to it
        release.write_served_model(result.model, plan.config.model.name, partial)
        result.metrics.to_parquet(partial / release.SCORES_FILE, index=False)
        matrix.to_parquet(partial / release.MATRIX_FILE, index=False)
        hits = {name: from_numpy(x) for name, x in result.hits.items()}
        save_tensors(hits, partial / release.HITS_FILE)
        score_sentences = _sentences(plan, result, state.with_name(release.LOG_FILE))
        card = release_card(
            record, plan.config, plan.corpus, comparison, plan.notes, score_sentences
        )
        (partial / release.CARD_FILE).write_text(card, encoding="utf-8")
        title = f"{plan.name}: what update {plan.number} taught, and what it cost"
        if not plan.report.new.get("test"):
            title = f"{plan.name}: what update {plan.number} cost; what it taught is not scored"
        page = partial / release.REPORT_FILE
        write_report(comparison, page, title, notes=score_sentences, background=plan.notes)
        release.write_record(partial, record)


def _sentences(plan: UpdatePlan, result: RunResult, log: Path) -> list[str]:
    """Return sentences on the scores after an update, which wrote a log."""
    changed, split = ledgers.changed_retention(plan.ledger), plan.config.evaluation.split
    counts = {f"{split} image": plan.report.new.get(split, 0), "name": len(plan.report.new_names)}
    added = " and ".join(sentences.count_of(count, noun) for noun, count in counts.items() if count)
    before = (
        f"The card of {plan.earlier[-1].name} can give another A_KA for the model that is called "
        f"“before” here. It is the same model, but these are new since then: {added}."
    ) if plan.earlier and added else ""  # fmt: skip
    candidates = (
        sentences.describe_ruin(result.metrics, log, plan.config.training.batch),
        sentences.describe_unscored(plan.report),
        # without images that are gone, the same model has another score on the earlier ones, too
        "" if plan.gone else before,
        sentences.describe_retention(result.metrics, result.hits, plan.number, changed),
    )
    return [sentence for sentence in candidates if sentence]


def compare_with_before(plan: UpdatePlan, result: RunResult, device: str) -> Comparison:
    """Compare the model after an update with the one before."""
    section, name = plan.config.evaluation, plan.config.model.name
    if plan.parent:
        before = models.load_from_file(name, plan.parent.path(release.WEIGHTS_FILE))
        title = f"after {plan.parent.record.updates[-1].name}"
    else:
        before = models.load_model(plan.config.model, plan.config.seeds.init)
        title = f"{name} as it was"
    return compare(
        Candidate(title, name, before),
        Candidate(f"after {plan.name}", name, result.model),
        plan.corpus, arrived=[ledgers.update_label(plan.ledger.arrivals[-1])], split=section.split,
        subset=None if section.full else section.subset,
        precision=plan.config.training.precision, device=device,
    )  # fmt: skip


def update_device(start: str | os.PathLike[str], device: str | None = None) -> str:
    """Return the device of an update: by default the CPU for an embedded model, otherwise a GPU.

    Args:
        start: As for `update`.
        device: The device, if one is given.
    """
    start = os.path.expanduser(start)
    name = split_start(start)[0]
    if release.is_release(Path(start)):
        name = release.read_release(start).config.model.name
    return starts.default_device(name, device)


def update(
    start: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pool: str | Path | None = None,
    retain: Sequence[str | Path] = (),
    name: str = "",
    prompt: str = "",
    device: str | None = None,
    progress: bool = True,
    skip_gone: bool = False,
    moved: Mapping[str, str] | None = None,
    **settings: Any,
) -> Release:
    """Update a model with a folder of new images, and write a release.

    Args:
        start: The release to start from, or its folder; for the first update a model, "NAME:START".
        data: The folder of the new images.
        out: The folder of the release.
        pool: A folder of images to replay in this and all later updates, in place of an earlier
            one; for the first update also "embedded".
        retain: Folders of images that A_ZS is scored on from this update on, besides earlier ones;
            each is a set of its own, named after the folder unless it has a manifest.
        name: The name of the update; by default, the folder's.
        prompt: For the first update: the prompt of a class in folders without a manifest, such as
            "a photo of a {}"; by default, the model's usual one.
        device: "cpu" or "cuda". If None, the CPU for an embedded model and a GPU for others.
        progress: Whether to show what is new, and a progress bar.
        skip_gone: Whether to continue without images of earlier updates that are gone.
        moved: Old folder -> new folder, for earlier images that have moved.
        **settings: Sections of the config, as dicts.

    Returns:
        The release.

    Raises:
        CmpError: The update cannot be computed; the message says why.

    Example:
        >>> cmp.update("releases/2026-01", "pictures/2026-02", "releases/2026-02")  # doctest: +SKIP
    """
    device, folder = update_device(start, device), Path(os.path.expanduser(out))
    if not release.is_release(folder):
        check_device(device)
    plan = plan_update(
        start, data, settings, pool=pool, retain=retain, name=name, prompt=prompt,
        skip_gone=skip_gone, moved=moved,
    )  # fmt: skip
    with tqdm(total=plan.steps, unit=" steps", disable=not progress) as bar:
        for note in plan.notes if progress else ():
            bar.write(note)
        return compute_update(plan, folder, advance_bar(bar), device)
