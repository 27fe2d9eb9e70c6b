"""Plan an update: what is new, how long it is trained, what it starts from.

Every check of an update that needs no training is made here, before anything is computed.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmp import budgets, config, mixtures, schedules, starts
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.errors import CmpError, clean_text
from cmp.mixtures import Pools
from cmp.readers import notes
from cmp.readers.collection import join_by_set
from cmp.readers.manifest import check_prompt
from cmp.registry import get_option
from cmp.releases import arrivals, release, sentences
from cmp.releases import ledger as ledgers
from cmp.releases.candidates import split_start
from cmp.releases.ledger import EMBEDDED, OPTIONS, ArrivalReport, Ledger, Role
from cmp.releases.release import Release, UpdateRecord
from cmp.releases.sentences import count_of
from cmp.runs import identity, store
from cmp.runs.identity import json_digest

KEPT_KEYS = ("model", "method", "merging.policy", "optimizer.carry", "seeds", "evaluation.split")
"""Keys that cannot change after the first update of a stream, since its state depends on them or,
for the split, the scores before and after an update would not be of the same images."""
KEPT_MERGE_KEYS = tuple(f"merging.{key}" for key in ("rule", "shares", "power", "reverse", "zero"))
"""Further keys that cannot change if the policy merges the models of all updates: it then remembers
each model, or only their mean or maximum, depending on these keys."""
FIXED_KEYS = {
    "data": "images are given by --data, --pool and --retain",
    "stream": "an update is one task, with the classes of its images",
    "training.steps": "set training.passes, or training.task_steps=[N] for a number of steps",
    "training.budget": "set training.passes, or training.task_steps=[N] for a number of steps",
    "mixture.last": "it needs the number of updates",
    "schedule.peaks": "it needs the number of updates; set schedule.peak for each",
}
"""Settings that an update cannot have, each with the reason or what to do instead."""


@dataclass(frozen=True)
class UpdatePlan:
    """An update that can be computed.

    Attributes:
        id: Its id: the hash of the release or model that it starts from, its config and its new
            images.
        parent: The release that it starts from, or None for the first update.
        config: The config as given.
        fitted: The config that is actually run, see `cmp.budgets.settle`.
        ledger: All images so far, the new ones included.
        corpus: The data.
        pools: What the update draws from.
        prompt: The prompt for sets whose manifest has none.
        report: What is new.
        gone: How many images of earlier updates are gone.
        is_peak_given: Whether the peak is among its settings.
        unscored: Sentences on images of new retention sets that are not scored, and on scores of
            sets with captions that are high by chance or cannot reach 100%.
    """

    id: str
    parent: Release | None
    config: RunConfig
    fitted: RunConfig
    ledger: Ledger
    corpus: Corpus
    pools: Pools
    prompt: str
    report: ArrivalReport
    gone: int
    is_peak_given: bool
    unscored: tuple[str, ...]

    def with_peak(self, peak: float) -> "UpdatePlan":
        """Return the plan of the same update at another peak of the learning rate."""
        return dataclasses.replace(self._with("schedule", peak=peak), is_peak_given=True)

    def on_validation(self) -> "UpdatePlan":
        """Return the plan of the same update, scored on the validation split."""
        return self._with("evaluation", split="validation")

    def _with(self, section: str, **changed: Any) -> "UpdatePlan":
        run_config, fitted = (
            dataclasses.replace(x, **{section: dataclasses.replace(getattr(x, section), **changed)})
            for x in (self.config, self.fitted)
        )
        update_id = _update_id(run_config, self.parent, self.ledger, self.prompt, self.gone)
        return dataclasses.replace(self, id=update_id, config=run_config, fitted=fitted)

    def check_parent(self) -> None:
        """Check what training reads of the release that it starts from. Until then, that release
        may be slimmed: the release of this update may be there already.

        Raises:
            CmpError: A file is missing or damaged, or an option has another source than before.
        """
        if self.parent:
            for name in (release.WEIGHTS_FILE, release.MATRIX_FILE, *self.parent.slimmable()):
                self.parent.path(name)
            store.check_sources(self.parent.record.id, self.parent.progress().options)

    @property
    def name(self) -> str:
        """The update's name."""
        return self.ledger.arrivals[-1].name

    @property
    def number(self) -> int:
        """The update's number, from 1."""
        return self.ledger.updates

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return self.fitted.steps[-1]

    @property
    def earlier(self) -> tuple[UpdateRecord, ...]:
        """The updates before it."""
        return self.parent.record.updates if self.parent else ()

    @property
    def peak_source(self) -> str:
        """Where its peak comes from, or "" for the recipe's."""
        return sentences.describe_peak(self.is_peak_given, self.earlier)

    @property
    def notes(self) -> list[str]:
        """Sentences that a user should read before it is trained."""
        return [clean_text(note) for note in _notes(self)]


def plan_update(
    start: str | os.PathLike[str],
    data: str | os.PathLike[str],
    settings: Mapping[str, Any] | Sequence[str] = (),
    *,
    pool: str | Path | None = None,
    retain: Sequence[str | Path] = (),
    name: str = "",
    prompt: str = "",
    skip_gone: bool = False,
    moved: Mapping[str, str] | None = None,
) -> UpdatePlan:
    """Plan an update, without training or writing anything.

    Args:
        start: A release, or its folder; for the first update "NAME" or "NAME:START" of a model,
            such as "ViT-B-16:laion2b_s34b_b88k", "small" or "hf-hub:ORG/NAME".
        data: The folder of the new images.
        settings: Keys of the config to change, as nested dicts or as "key=value" texts.
        pool: A folder of images to replay in this and all later updates, in place of an earlier
            one; for the first update also "embedded".
        retain: Folders of images that A_ZS is scored on from this update on, besides earlier ones;
            each is a set of its own, named after the folder unless it has a manifest.
        name: The name of the update; by default, the folder's.
        prompt: For the first update: the prompt for sets whose manifest has none, such as "a photo
            of a {}"; by default, the model's usual one.
        skip_gone: Whether to continue without images of earlier updates that are gone.
        moved: Old folder -> new folder, for earlier images that have moved.

    Raises:
        CmpError: The update cannot be computed; the message says why.
    """
    tree = config.override({}, settings) if not isinstance(settings, Mapping) else dict(settings)
    tree = config.with_recipe(tree)
    start = os.path.expanduser(start)
    # another folder may have the name of a model
    is_other = Path(start).is_dir() and not starts.family_of(start)
    is_folder = release.is_release(Path(start)) or is_other
    parent = release.read_release(start) if is_folder else None
    if parent:
        _check_base(parent)
    _refuse_settings(tree, is_first=parent is None)
    base = parent.config.to_dict() if parent else _first_tree(start)
    prompt = _stream_prompt(prompt, parent, base["model"]["name"])
    ledger = ledgers.move(parent.ledger() if parent else Ledger(), moved or {})
    unscored = []
    for folder, role in [(pool, "pool"), *((each, "eval") for each in retain)]:
        if folder is not None:
            ledger, said = _arrive_beside(ledger, str(folder), role, prompt)
            unscored += said
    ledger, report = arrivals.arrive(ledger, os.fspath(data), "adapt", name, prompt)
    if not report.new.get("train"):
        some = f", such as {report.held_from[0]}" if report.held_from else ""
        raise CmpError(
            f"--data: {data}: all its new images are held out, by their own split or because an "
            f"earlier folder holds them out{some}, so none can be trained on; add images to train "
            "on"
        )
    ledger, parts, gone = arrivals.locate(ledger, skip_gone)
    unscored += [x for index in join_by_set(parts) for x in notes.limits_of_recall(index)]
    corpus = arrivals.corpus_of(ledger, parts)
    run_config = _update_config(base, tree, parent, ledger.updates)
    if not len(corpus.rows(run_config.evaluation.split)):
        raise CmpError(
            f"{data}: no image of this stream is in the split {run_config.evaluation.split!r}, so "
            "nothing could be scored; add images, or pass --retain FOLDER"
        )
    fitted = budgets.settle(run_config, corpus)
    pools = mixtures.task_pools(fitted, corpus, ledger.updates - 1)[-1]
    update_id = _update_id(run_config, parent, ledger, prompt, gone)
    return UpdatePlan(
        update_id, parent, run_config, fitted, ledger, corpus, pools, prompt, report, gone,
        "peak" in tree.get("schedule", {}), tuple(unscored),
    )  # fmt: skip


def _refuse_settings(tree: Mapping[str, Any], is_first: bool) -> None:
    """Raise `CmpError` for a setting that no update can have, or only the first."""
    for key, value in tree.items():
        if not isinstance(value, Mapping):  # such as training=5, whose keys are looked at below
            config.parse({key: value}, "cmpt update")
    given = dict(config.flat_keys(tree))
    if "seed" in given and not is_first:
        raise CmpError("seed: a stream keeps its seeds from the first update on; leave it out")
    for key, reason in FIXED_KEYS.items():
        for name in given:
            if f"{name}.".startswith(f"{key}."):
                raise CmpError(f"{name}: not allowed in an update: {reason}")
    meta = given.get("schedule.meta")
    if isinstance(meta, str) and "peaks" in get_option("meta_schedule", meta).settings:
        raise CmpError(f"schedule.meta: {meta!r}: {FIXED_KEYS['schedule.peaks']}")


def _check_base(parent: Release) -> None:
    """Raise `CmpError` if the model that a stream began with was in a folder that is gone."""
    folder = starts.model_folder(parent.config.model.name)
    if folder and not folder.is_dir():
        raise CmpError(
            f"{folder}: is not there, but this stream began with the model in this folder, and "
            "each update reads its config and tokenizer; put it back, or a link to its new place"
        )


def _first_tree(start: str) -> dict[str, Any]:
    """Return the config of a model's first update before the user's settings, as a tree."""
    name, weights = split_start(start)
    if os.sep in name and not starts.is_hub(name):
        raise CmpError(f"{start}: there is no such release")
    starts.check_name(name)
    family = starts.family_of(name)
    if folder := starts.model_folder(name):  # later updates may be called from elsewhere
        name = f"local-dir:{folder.absolute()}"
    section = {"name": name} | ({"start": weights} if weights else {})
    if not weights and not family:
        raise CmpError(
            f"--start: {start!r}: name the weights, too, as in ViT-B-16:laion2b_s34b_b88k, or give "
            "the folder of a release"
        )
    tree = config.overlay(config.UPDATES["embedded" if family else "foreign"], {"model": section})
    return config.overlay(tree, config.recipe_tree("default"))


def _stream_prompt(prompt: str, parent: Release | None, name: str) -> str:
    """Return the prompt for sets whose manifest has none: the stream's or, for the first update,
    the given one, by default the model's usual one."""
    before = parent.record.prompt if parent else ""
    if before and prompt not in ("", before):
        raise CmpError(
            f"--prompt: {prompt!r}, but this stream has {before!r}, which cannot change, so that "
            "scores can be compared; start a new stream with --start"
        )
    prompt = prompt or before or starts.usual_prompt(name)
    try:
        return check_prompt(prompt)
    except ValueError as error:
        raise CmpError(f"--prompt: {error}") from error


def _arrive_beside(
    ledger: Ledger, folder: str, role: Role, prompt: str
) -> tuple[Ledger, list[str]]:
    """Return the ledger with a retention set added, or with a pool in place of the earlier one; and
    sentences on images that are left out, are not scored, or look like one on the other side."""
    option = OPTIONS[role]
    if not folder.strip():
        raise CmpError(f"{option}: is empty; give a folder, or leave the option out")
    if folder == EMBEDDED and role != "pool":
        raise CmpError("--retain: give a folder; embedded images can only be a pool")
    if folder == EMBEDDED and ledger.updates:
        raise CmpError("--pool: the embedded pool can be named at the first update only")
    before, pools = ledger, []
    if role == "pool":
        pools = [n for n, x in enumerate(ledger.arrivals) if x.role == role]
        ledger = ledger.without(ledger.pictures["arrival"].isin(pools))
    ledger, report = arrivals.arrive(ledger, folder, role, prompt=prompt)
    if pools and _brought_same(before, pools[-1], ledger):
        return before, [f"--pool: {folder} is the pool of this stream already; leave it out"]
    said = [_similar_line("image", report)] if report.similar else []
    said = [f"{option}: {x}" for x in (*said, sentences.describe_skipped(report)) if x]
    trained = report.new.get("train", 0)
    if role != "eval" or not trained:
        return ledger, said
    reason = (
        "each is in a training split, the pool or an earlier folder; take these out of the pool, "
        "or give others"
    )
    if {*report.new} == {"train"}:
        raise CmpError(f"--retain: {folder}: none of its images is left to score: {reason}")
    name, last = ledger.arrivals[-1].name, len(ledger.arrivals) - 1
    pictures = ledger.pictures
    is_trained = (pictures["arrival"] == last) & (pictures["split"] == "train")
    some = pictures["source"][is_trained].iloc[0]
    count = count_of(sum(report.new.values()), "image")
    said.append(f"--retain: {name}: not scored: {trained:,} of {count}, such as {some}: {reason}")
    return ledger, said


def _brought_same(before: Ledger, number: int, after: Ledger) -> bool:
    """Return whether an arrival in a ledger and the last one in another are the same folder with
    the same images."""
    last = len(after.arrivals) - 1
    was, now = (
        each.pictures[each.pictures["arrival"] == n].drop(columns="arrival").reset_index(drop=True)
        for each, n in ((before, number), (after, last))
    )
    return before.arrivals[number] == after.arrivals[last] and was.equals(now)


def _similar_line(noun: str, report: ArrivalReport) -> str:
    """Return a sentence on images that look like one on the other side."""
    by_class = [f"{count:,} of {name}" for name, count in report.similar.items()]
    return (
        f"{count_of(sum(report.similar.values()), noun)} with a lookalike on the other side of the "
        f"split between training and tests, such as {', '.join(report.similar_names)} "
        f"({sentences.list_names(by_class)}); all are used, but scores may be too high"
    )


def _update_config(
    base: dict[str, Any], tree: dict[str, Any], parent: Release | None, number: int
) -> RunConfig:
    """Return the config of an update: that of the previous one, with the user's changes."""
    steps = [update.steps for update in parent.record.updates] if parent else []
    own = tree.get("training", {}).get("task_steps", [])
    if not isinstance(own, list | tuple) or len(own) > 1:
        raise CmpError(
            f"training.task_steps: {own!r}: an update is one task; give a list with one number, "
            "such as [10]"
        )
    fixed = {
        "stream": {"order": "given", "tasks": number},
        "training": {"task_steps": [*steps, *own]},
    }
    policy = base.get("merging", {}).get("policy")
    if tree.get("merging", {}).get("policy", policy) != policy:  # its settings are of that policy
        base = base | {"merging": {}}
    above = config.overlay(tree, fixed)
    result = config.parse(config.overlay({**base, "data": "pictures"}, above), "cmpt update")
    if parent:
        before, after = (dict(config.flat_keys(x.to_dict())) for x in (parent.config, result))
        merges = get_option("merge_policy", result.merging.policy).facts["merges"]
        kept = KEPT_KEYS + (KEPT_MERGE_KEYS if "all" in merges else ())
        for key in before:
            if before[key] != after[key] and any(f"{key}.".startswith(f"{k}.") for k in kept):
                raise CmpError(
                    f"{key}: {after[key]!r}, but this stream has {before[key]!r}, which cannot "
                    "change; start a new stream with --start"
                )
    return result


def _update_id(
    run_config: RunConfig, parent: Release | None, ledger: Ledger, prompt: str, gone: int
) -> str:
    """Return the id of an update, the hash of everything that determines its result."""
    earlier = len(parent.record.arrivals) if parent else 0
    content = identity.config_identity(run_config, with_start=not parent)
    content["config"].pop("data", None)  # only a name
    content |= {
        "parent": parent.record.id if parent else "",
        "pictures": ledger.digest(earlier),
    }
    if not parent and prompt != starts.usual_prompt(run_config.model.name):
        content["prompt"] = prompt
    if readings := ledger.unusual_readings(earlier):
        content["readings"] = readings
    if gone:
        content["ledger"] = ledger.digest()
    return json_digest(content)


def _notes(plan: UpdatePlan) -> Iterable[str]:
    """Yield the sentences of `UpdatePlan.notes`."""
    report, counts, training = plan.report, plan.pools.counts, plan.fitted.training
    new = report.new
    yield (
        f"update {plan.number}, {plan.name}: {count_of(sum(new.values()), 'new image')}: "
        f"{new.get('train', 0):,} to train on, {new.get('validation', 0):,} for tuning, "
        f"{new.get('test', 0):,} for tests"
    )
    if report.new_names or report.old_names:
        some = f" ({sentences.list_names(report.new_names)})" if report.new_names else ""
        known = count_of(len(report.old_names), "known name")
        yield f"{count_of(len(report.new_names), 'new name')}{some}, {known}"
    if sentence := sentences.describe_unscored(report):
        yield sentence
    if folder := starts.model_folder(plan.config.model.name):
        yield f"each update reads the config and tokenizer in {folder}, so leave that in its place"
    if report.reading:
        yield f"no manifest: the folder is read as {report.reading}"
    yield from _describe_sets(plan.ledger, plan.config.model.name)
    yield from _describe_twins(plan.corpus)
    if report.again:
        yield f"left out: {count_of(report.again, 'image')} already known under the same name"
    if sentence := sentences.describe_skipped(report):
        yield sentence
    if report.held_out:
        some = ", ".join(report.held_from)
        count = count_of(report.held_out, "image")
        yield f"{count} held out before, such as {some}, and held out again"
    if report.twice:
        yield (
            f"{count_of(report.twice, 'new image')} with two names, such as "
            f"{' and '.join(report.twice_names)}; both names count, so remove the wrong one"
        )
    if report.copies:
        yield (
            f"{count_of(report.copies, 'new image')} with the pixels of a known one under the same "
            "name, saved again; remove them, or they are trained on or tested twice"
        )
    if report.similar:
        yield _similar_line("new image", report)
    if plan.gone:
        yield f"left out: {count_of(plan.gone, 'image')} missing from earlier updates"
    passes = plan.steps * counts[1] / max(len(plan.pools.update), 1)
    least = mixtures.MIN_STEPS
    are_given = len(plan.config.training.task_steps) == plan.number
    is_often = not are_given and plan.steps == least and passes >= 1.25 * (training.passes or 1)
    yield (
        f"{count_of(plan.steps, 'step')} at batch {sum(counts)}: "
        f"{count_of(counts[1], 'new image')}, {counts[2]} earlier ones, {counts[0]} of the pool; "
        f"a new image appears {passes:.1f} times"
        + is_often
        * f", since an update has at least {least} steps"
    )
    source = plan.peak_source or "the recipe's, not tuned for these images; see cmpt tune"
    yield f"peak learning rate: {max_rate(plan.fitted):g}, {source}"
    usual = mixtures.batch_counts(plan.fitted.mixture, training.batch, not len(plan.pools.buffer))
    if sum(counts) < training.batch:
        yield f"there are too few images for batches of {training.batch}"
    elif counts[1] < usual[1]:
        why = f"otherwise {least} steps would show them too often"
        if plan.steps < least:
            why = f"this is the number for {least} steps or more"
        yield (
            f"the update is small, so a batch has {count_of(counts[1], 'new image')} instead of "
            f"{usual[1]}; {why}"
        )
    if not len(plan.pools.pretraining):
        yield (
            "no pool is replayed, so only merging protects what the model knew before its first "
            "update; pass --pool FOLDER with images like those of pretraining"
        )
    yield from plan.unscored
    if not plan.corpus.by_role("eval"):
        yield "forgetting is not measured; pass --retain FOLDER with images that the model knew"
    yield from notes.describe_differences(plan.corpus.noted)


def _describe_sets(ledger: Ledger, model: str) -> Iterable[str]:
    """Yield sentences on the sets of the new images, and on the prompts of all sets."""
    sets = [tree["name"] for tree in ledger.arrivals[-1].sets]
    if sets == [*ledgers.set_names(ledger, "adapt")]:
        word = "set" if len(sets) == 1 else "sets"
        yield f"the {word} {', '.join(sets)}: the images of all updates"
    else:
        yield f"the new images belong to {', '.join(sets)}"
    earlier = [*ledgers.set_names(Ledger(ledger.arrivals[:-1]), "adapt")]
    for name in sets if earlier else ():
        if name not in earlier:
            yield (
                f"{name} is a set of its own, scored apart from {', '.join(earlier)}; to join "
                f"{earlier[0]}, give the folder a manifest with `name: {earlier[0]}`"
            )
    by_prompt: dict[str, list[str]] = {}
    for name, tree in ledgers.known_sets(ledger).items():
        by_prompt.setdefault(tree.get("prompt", starts.USUAL_PROMPT), []).append(name)
    prompts = [f'"{prompt}" for {", ".join(names)}' for prompt, names in by_prompt.items()]
    words = "prompt" if len(prompts) == 1 else "different prompts"
    yield f"{words}: {'; '.join(prompts)}"
    if (usual := starts.usual_prompt(model)) != starts.USUAL_PROMPT in by_prompt:
        yield (
            f'{model} was pretrained with the prompt "{usual}" and may name far fewer images '
            f'with "{starts.USUAL_PROMPT}"'
        )


def _describe_twins(corpus: Corpus) -> Iterable[str]:
    """Yield a sentence for each set with names that tokenizers may not tell apart."""
    for dataset in corpus.by_role("adapt"):
        if twins := notes.twin_spellings(corpus.classes[dataset]):
            some = "; ".join(twins[: ledgers.NAMED])
            yield (
                f"{count_of(len(twins), 'name')} in {dataset} in several spellings that the model "
                f"may not tell apart: {some}; if they are one class, give it one name"
            )


def max_rate(fitted: RunConfig) -> float:
    """Return the highest learning rate of the last task of a config."""
    return max(schedules.task_rates(fitted.schedule, fitted.steps, fitted.stream.tasks - 1))
