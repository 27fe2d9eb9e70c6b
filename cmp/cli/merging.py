"""The command `merge`, which merges files of weights, or scores several ways to merge them."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cmp.cli import shared
from cmp.errors import CmpError, did_you_mean
from cmp.registry import Option, get_option


def merge(
    rule: str,
    models: list[Path],
    out: Annotated[Path | None, typer.Option("--out", "-o")] = None,
    base: Path | None = None,
    weights: str | None = None,
    scale: float | None = None,
    density: float | None = None,
    outliers: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    protect: float | None = None,
    seed: shared.NotNegative = 0,
    candidates: Annotated[list[str] | None, typer.Option("--try", metavar="KEY=VALUE,...")] = None,
    model: str | None = None,
    data: str | None = None,
    threads: shared.Threads = 1,
    device: str | None = None,
) -> None:
    """Merge safetensors files into one, tensor by tensor.

    The new file's metadata lists the merged files. With --try, nothing is written: merges with
    each value are scored on the validation images of --data.

    Args:
        rule: Merge rule, such as ties; `cmpt config merging` lists all. opcm and tsv decompose each
            matrix: for two ViT-B/16, this takes one or two minutes on one core. All others take
            seconds.
        models: Safetensors files to merge, newest first.
        out: File to write, NAME.safetensors. Only an earlier merge is replaced.
        base: Weights that the models were trained from, for rules on task vectors.
        weights: Weight of each model, such as 0.7,0.3. Default: equal weights.
        scale: Factor of the merged task vector. Default: that of the rule.
        density: Fraction of a task vector's entries to keep, 0 to 1. Default: 0.3.
        outliers: Fraction of the largest entries to drop, 0 to 1. Default: 0.01.
        alpha: Factor of the first block, for rule `lines`. Default: 0.5.
        beta: Increase of the factor from the first to the last block, for rule `lines`.
            Default: 0.5.
        protect: Leading directions of earlier models that later ones must not change, for rule
            `opcm`, as a fraction of the sum of singular values. Default: 0.5.
        seed: Seed for rules with random draws.
        candidates: Values of a setting to compare, such as density=0.1,0.3, or
            weight=0.1,0.25,0.5 for the weight of the newest model; repeat for combinations.
        model: Network of the files, for --try: one of this book's own models, such as small, or an
            open_clip model.
        data: Data to score on, for --try: embedded, fomo, or a folder of manifests. Default:
            embedded.
        device: Device for scoring, for --try: cpu or cuda. Default: cpu for this book's own models,
            otherwise cuda.

    Example:
        cmpt merge ties new.safetensors old.safetensors --base start.safetensors -o out.safetensors
    """
    import torch
    from tqdm import tqdm

    from cmp.merging.files import merge_files

    if bool(candidates) == bool(out):
        raise CmpError(
            "give either -o FILE to write a merge or --try KEY=VALUES to compare settings"
        )
    torch.set_num_threads(threads)
    settings = {"scale": scale, "density": density, "outliers": outliers, "alpha": alpha,
                "beta": beta, "protect": protect}  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    given |= {"weights": parse_weights(weights), "draw": (seed,)}
    if out is None:
        if model is None:
            raise CmpError("--try: give the network of the files with --model, such as small")
        source = data or "embedded"
        try_settings(rule, models, base, given, candidates or [], model, source, device)
        return
    shared.refuse_options("needs --try", model=model, data=data, device=device)
    shared.check_out(out, suffix=".safetensors")
    total = merged_bytes([*models, *([base] if base else [])])
    with tqdm(total=total, desc=rule, unit="B", unit_scale=True, disable=None) as bar:
        merge_files(rule, models, out, base, bar.update, **given)
    typer.echo(f"{out}: {rule} of {len(models)} models")


def try_settings(
    rule: str,
    paths: Sequence[Path],
    base: Path | None,
    given: dict[str, Any],
    candidates: Sequence[str],
    model: str,
    data: str,
    device: str | None,
) -> None:
    """Score merges with each combination of settings on validation images, and print a table.

    Args:
        rule: The rule.
        paths: The files to merge, newest first. They are also scored.
        base: The weights that they were trained from.
        given: The settings shared by all merges.
        candidates: The values to compare, as "key=value,value" for one key each.
        model: The network of the files.
        data: The data to score on.
        device: The device for scoring.

    Raises:
        CmpError: A candidate cannot be read, the rule does not take it, or torch cannot use the
            device.
    """
    from tqdm import tqdm

    from cmp import evaluation, models, starts
    from cmp.data import load_data
    from cmp.merging.files import merge_files
    from cmp.merging.rules import MergeOptions
    from cmp.scale import devices

    option = get_option("merge_rule", rule)
    trials = candidate_settings(option, candidates, len(paths))
    merged_bytes([*paths, *([base] if base else [])])
    for trial in trials.values():  # before computing anything
        MergeOptions.make(option, len(paths), **given | trial)
    devices.check_device(device := starts.default_device(model, device))
    corpus, rows = load_data(data), []

    def score(label: str, path: Path) -> None:
        network = models.load_from_file(model, path).to(device)
        scores = evaluation.evaluate(network, model, corpus, "validation")
        summary = scores.summary()
        cells = [
            shared.score_text(value)
            for key in evaluation.ROLES
            for value in (
                (summary[key], scores.aggregate(key)[1]) if key in summary else (None,) * 2
            )
        ]
        rows.append((label, *cells, shared.score_text(summary.get("GM"))))

    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(paths) + len(trials), desc=rule, disable=None) as bar,
    ):
        for path in paths:
            score(path.name, path)
            bar.update()
        for label, trial in trials.items():
            merged = Path(folder) / "merged.safetensors"
            merge_files(rule, paths, merged, base, **given | trial)
            score(label, merged)
            bar.update()
    columns = [rule, *(column for key in evaluation.ROLES for column in (key, "s.e.")), "GM"]
    shared.print_table(columns, rows, f"{model}, validation, in percent")


def candidate_settings(
    rule: Option, candidates: Sequence[str], count: int
) -> dict[str, dict[str, Any]]:
    """Return the settings of each combination of candidates, by its label in the table.

    Args:
        rule: The rule.
        candidates: "key=value,value" for one key each. "weight" is that of the newest model, and
            the others share the rest.
        count: The number of models to merge.

    Raises:
        CmpError: A candidate does not have this form, the rule does not take its key, or a key is
            given twice.
    """
    from cmp.merging.rules import tensor_settings

    known = [*(["weight"] if "weight" in rule.settings else []), *tensor_settings(rule)]
    choices = []
    for text in candidates:
        key, _, values = text.partition("=")
        if key not in known:
            takes = f"{rule.name!r} takes {', '.join(known) or 'no settings'}"
            raise CmpError(f"--try {text}: {takes}, not {key!r}{did_you_mean(key, known)}")
        try:
            choices.append([(key, float(value)) for value in values.split(",")])
        except ValueError as error:
            raise CmpError(f"--try {text}: expected numbers, such as weight=0.1,0.5") from error
    keys = [text.partition("=")[0] for text in candidates]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise CmpError(
            f"--try: {twice[0]!r} is given twice; give all its values at once, as in "
            f"{twice[0]}=0.1,0.3"
        )
    trials = {}
    for combination in itertools.product(*choices):
        trial: dict[str, Any] = dict(combination)
        if "weight" in trial:
            newest = trial.pop("weight")
            others = (1 - newest) / max(count - 1, 1)
            trial["weights"] = [newest, *[others] * (count - 1)]
        trials[" ".join(f"{key}={value:.12g}" for key, value in combination)] = trial
    return trials


def merged_bytes(paths: Sequence[Path]) -> int:
    """Return how many bytes a merge reads and writes; raise `CmpError` if a file is missing."""
    if missing := [path for path in paths if not path.is_file()]:  # a pipe may never end
        raise CmpError(f"{missing[0]}: cannot be read: no such regular file")
    sizes = [path.stat().st_size for path in paths]
    return sum(sizes) + sizes[0]


def parse_weights(text: str | None) -> list[float] | None:
    """Return the numbers in `--weights`; raise `CmpError` if they are not numbers."""
    try:
        return text and [float(number) for number in text.split(",")]
    except ValueError as error:
        raise CmpError(f"--weights {text}: expected numbers such as 0.7,0.3") from error
