"""Flip single bits in every kind of stored file: each is found, or changes nothing that is read.

`make flip-test` is 2,000 flips; the tests do fewer.
"""

import argparse
import dataclasses
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import months
import pandas as pd
import pytest
import torch
from forked import small_config, small_corpus
from pictures import classes, fileset, picture, tar
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from benchmark import drawn, pretraining
from cmp import config, models, streams
from cmp.data import Corpus
from cmp.embedded import models as embedded_models
from cmp.embedded import packed
from cmp.embedded.manifest import embedded_manifests, store_path
from cmp.errors import CmpError
from cmp.files import DIGESTS, tensors_digest
from cmp.merging.files import merge_files
from cmp.project import build_folder
from cmp.readers import checks, class_tables, collection, tars
from cmp.readers.manifest import FileSet
from cmp.releases import release, sentences, update, update_plan
from cmp.releases.candidates import find_candidate
from cmp.runs import checkpoints, identity, launch, store
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import execute
from lab.evidence import results, studies

REFUSED, SAME, SEEN, MADE = "refused", "the same", "another id", "made again"
DIFFERENT = "silently different"
DATASET = "shapes"
SETTINGS = ("evaluation.full=true", "stream.tasks=2", "training.steps=2")


class Stored(NamedTuple):
    """A stored file. read: what is read of it, as text; shows: whether a change of its content is
    meant to show in what a run from it is called, so that it need not be refused; first: how many
    bytes at its beginning matter, 0 for all."""

    path: Path
    read: Callable[[], str]
    shows: bool = False
    first: int = 0


def text_of(value: Any) -> str:
    """A value as text that differs if it does."""
    if isinstance(value, dict) and all(isinstance(x, torch.Tensor) for x in value.values()):
        return tensors_digest(value)
    if isinstance(value, pd.DataFrame) and "hits" in value:  # bytes, or nothing
        value = value.assign(hits=value["hits"].map(repr))
    return value.to_json(double_precision=15) if hasattr(value, "to_json") else repr(value)


def read_run(run_id: str) -> str:
    """All that is stored of a run."""
    run = store.load_run(run_id)
    hits = {name: hits.tobytes() for name, hits in sorted(run.hits.items())}
    weights = store.final_model(run).state_dict()
    parts = (run.id, run.config.to_dict(), run.provenance, run.weights, run.identity, hits)
    return "\n".join(map(text_of, (*parts, run.metrics, weights)))


def read_checkpoint(path: Path) -> str:
    """A checkpoint's progress and tensors."""
    state = checkpoints.read_checkpoint(path)
    return text_of(state.progress) + text_of(state.tensors)


def read_header(path: Path) -> str:
    """A checkpoint's progress, which is read without its tensors."""
    return text_of(checkpoints.read_progress(path))


def header_bytes(path: Path) -> int:
    """How long the header of a safetensors file is."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def read_model(path: Path) -> str:
    """The tensors of a file beside checkpoints."""
    checkpoints.check_content(path)
    return text_of(load_file(path))


def read_base(path: Path) -> str:
    """A base's tensors."""
    return text_of(embedded_models.read_weights(embedded_models.check_base(path)))


def read_pool_table(corpus: Corpus) -> str:
    """The table of the embedded pools, of a few images."""
    rows = corpus.rows("train", dataset=corpus.by_role("pool")[0])[:3]
    return text_of(class_tables.pool_statistics(corpus, rows))


def read_packed() -> str:
    """A packed dataset."""
    opened = packed.read_packed(embedded_manifests()[DATASET])
    pixels = torch.from_numpy(opened.images.copy())
    return text_of(opened.header) + text_of(opened.table) + text_of({"pixels": pixels})


def read_start(path: Path) -> str:
    """How weights to start from enter a run's id, and their tensors."""
    run_config = config.parse({"model": {"start": str(path)}})
    return identity.start_identity(run_config)[1]["weights"] + text_of(load_file(path))


def read_checked(manifest: FileSet, root: Path) -> str:
    """The images of a set that can be used, by what is known of them, and the faults."""
    usable, damaged = checks.usable_images(collection.read_index(manifest, root))
    return text_of(usable.table) + text_of([usable.content, damaged])


def write_kept(place: Path) -> list[Stored]:
    """Write a file of each kind that is kept in the build folder and made again if need be."""
    folder = classes(place / "pictures", each=2)
    (folder / "oak/0.png").write_bytes(b"no picture")
    path = tar(place / "pictures.tar", [("1.png", picture(1)), ("1.txt", b"one")])
    reads = [
        partial(read_checked, fileset(), folder),
        lambda: repr(tars.tar_samples(path)),
    ]
    files, build = [], build_folder()
    for read in reads:
        before = {*build.rglob("*.*")}
        read()
        files += [Stored(path, read) for path in {*build.rglob("*.*")} - before]
    return files


def read_served(folder: Path) -> str:
    """A release as it is exported, scored and compared."""
    candidate = find_candidate(str(folder))
    return candidate.name + text_of(dict(candidate.network.state_dict()))


def read_whole_release(folder: Path) -> str:
    """All that a further update reads of a release."""
    made = release.read_release(folder)
    for name in (release.START_FILE, release.MATRIX_FILE, release.WEIGHTS_FILE):
        made.path(name)
    parts = (repr(made.record), repr(made.ledger()), sentences.describe_release_retention(made))
    return "\n".join((*parts, text_of(made.state().tensors)))


def write_release(place: Path) -> list[Stored]:
    """Write a release, and return how its files are read."""
    months.write_pictures(place, 1)
    data = place / months.month_name(0)
    plan = update_plan.plan_update(months.START, data, months.SMALL, pool=place / "pool")
    made = update.compute_update(plan, place / "release")
    unread = (release.CARD_FILE, release.REPORT_FILE, release.LOG_FILE)
    files = [made.folder / name for name in (release.RECORD_FILE, *made.record.files)]
    served = (release.WEIGHTS_FILE, release.CONFIG_FILE)
    return [
        Stored(
            path, partial(read_served if path.name in served else read_whole_release, made.folder)
        )
        for path in files
        if path.name not in unread
    ]


def write_all(place: Path, patch: pytest.MonkeyPatch) -> list[Stored]:
    """Write a file of each kind, and return how each is read."""
    corpus = small_corpus()  # while the data are in sight
    patch.setenv("CMP_BUILD", str(place / "build"))
    dataset = embedded_manifests()[DATASET]
    packed.write_packed(dataset, drawn.make_scenes(dataset.recipe, {}))
    patch.setattr(packed, "load_embedded", lambda *roles: corpus)
    patch.setattr(results, "RESULTS", place / "results")
    patch.setattr(studies, "STUDIES", place)
    run_config = small_config(*SETTINGS)
    run = launch.run_one(run_config, keep=True)
    folder, files = store.run_folder(run.id), []
    for name in store.FILES:
        files.append(Stored(folder / name, partial(read_run, run.id)))
    with CheckpointManager("c" * 64, interval=0.0) as manager:
        execute(run_config, corpus, manager=manager)
        [path, *_] = checkpoints.checkpoint_files(manager.folder)
        files.append(Stored(path, partial(read_checkpoint, path)))
        state = checkpoints.read_checkpoint(path)
        header = {"progress": json.dumps(dataclasses.asdict(state.progress))}  # as 0.2.0 wrote it
        old = checkpoints.write_tensors(state.tensors, header, place / "old", "task-2-step-0")
        files += [Stored(x, partial(read_header, x), first=header_bytes(x)) for x in (path, old)]
        manager.keep_base(3, checkpoints.strip_prefix(state.tensors, "weights/"))
        for kind in ("model", "base"):
            [beside] = checkpoints.files_beside(manager.folder, kind)
            files.append(Stored(beside, partial(read_model, beside)))
    shutil.copytree(embedded_models.WEIGHTS, place / "weights")
    [base] = (place / "weights").glob("*.safetensors")
    files += [Stored(x, partial(read_base, base)) for x in (base, base.with_name(DIGESTS))]
    card = base.with_suffix(".json")
    files.append(Stored(card, lambda: text_of(pretraining.read_card(base))))
    shutil.copytree(class_tables.STATISTICS, place / "traits")
    patch.setattr(class_tables, "STATISTICS", place / "traits")
    classes_table, pool_table = sorted((place / "traits").glob("*.parquet"))
    files.append(Stored(classes_table, lambda: text_of(streams.class_statistics("embedded"))))
    read = partial(read_pool_table, corpus)
    files += [Stored(x, read) for x in (pool_table, pool_table.with_name(DIGESTS))]
    files += [Stored(path, read_packed) for path in store_path(DATASET).iterdir()]
    files += write_kept(place)
    files += write_release(place / "months")
    grid = {"question": "?", "replicates": 1, "live": [], "settings": {"a": {}}}
    (place / "77.yaml").write_text(json.dumps(grid))
    tree = run_config.to_dict()
    patch.setitem(config.PROFILES, "quick", tree | {"seed": 0})
    launch.run_one(studies.load_study("77").configs("quick")["a", 0])
    published = results.publish_study(studies.load_study("77"), "quick")
    for path in (published, published.with_name(DIGESTS)):
        files.append(Stored(path, lambda: text_of(results.published_metrics("77"))))
    merged, model = place / "merged.safetensors", run_config.model.name
    starts = [place / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(starts):
        save_file(models.create_model(model, seed).state_dict(), path)
    merge_files("interpolation", starts, merged)
    return [*files, Stored(merged, partial(read_start, merged), shows=True)]


def flip(stored: Stored, bit: int, before: str) -> str:
    """Flip a bit of a file, read it, and put it back; return what came of it."""
    content = stored.path.read_bytes()
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    stored.path.write_bytes(changed)
    try:
        now = stored.read()
        is_made = stored.path.read_bytes() == content
    except CmpError as error:
        names = (stored.path.name, stored.path.parent.name)
        return REFUSED if any(name in str(error) for name in names) else f"unnamed: {error}"
    finally:
        stored.path.write_bytes(content)
    if now == before:
        return MADE if is_made else SAME
    return SEEN if stored.shows and now[:64] != before[:64] else DIFFERENT


def flip_bits(
    files: list[Stored], count: int, generator: random.Random, tick: Callable[[], object] = int
) -> dict[str, Counter]:
    """Flip bits of each file in turn, one in four of them in its first 4,000 bytes.

    Returns:
        For each file's name how often each outcome came.
    """
    before = [stored.read() for stored in files]
    outcomes: dict[str, Counter] = {}
    for number in range(count):
        stored, then = files[number % len(files)], before[number % len(files)]
        size = stored.first or stored.path.stat().st_size
        if generator.random() < 0.25:
            size = min(size, 4000)
        outcome = flip(stored, generator.randrange(8 * size), then)
        name = f"{stored.path.parent.name}/{stored.path.name}" + ", header" * bool(stored.first)
        outcomes.setdefault(name, Counter())[outcome] += 1
        tick()
    return outcomes


def faults(outcomes: dict[str, Counter]) -> list[str]:
    """What should not have come."""
    return [
        f"{name}: {outcome}"
        for name, counts in outcomes.items()
        for outcome in counts
        if outcome not in (REFUSED, SAME, SEEN, MADE)
    ]


def main() -> None:
    """Print what came of the flips of each file; a fault makes the exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        files = write_all(Path(name), patch)
        with tqdm(total=arguments.flips, unit=" flips") as bar:
            generator = random.Random(arguments.seed)
            outcomes = flip_bits(files, arguments.flips, generator, bar.update)
    for name, counts in outcomes.items():
        print(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}")
    wrong = faults(outcomes)
    print("\n".join(wrong) or f"{arguments.flips} flips, none silently different")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
