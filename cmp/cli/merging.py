"""The command `merge`, which merges files of weights."""

from collections.abc import Sequence
from pathlib import Path

import typer

from cmp.cli import shared
from cmp.errors import CmpError


def merge(
    rule: str,
    models: list[Path],
    out: shared.OutFile,
    base: Path | None = None,
    weights: str | None = None,
    scale: float | None = None,
    density: float | None = None,
    outliers: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    protect: float | None = None,
    seed: shared.NotNegative = 0,
    threads: shared.Threads = 1,
) -> None:
    """Merge safetensors files into one, tensor by tensor.

    The new file's metadata lists the merged files.

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

    Example:
        cmpt merge ties new.safetensors old.safetensors --base start.safetensors -o out.safetensors
    """
    import torch
    from tqdm import tqdm

    from cmp.merging.files import merge_files

    torch.set_num_threads(threads)
    settings = {"scale": scale, "density": density, "outliers": outliers, "alpha": alpha,
                "beta": beta, "protect": protect}  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    given |= {"weights": parse_weights(weights), "draw": (seed,)}
    shared.check_out(out, suffix=".safetensors")
    total = merged_bytes([*models, *([base] if base else [])])
    with tqdm(total=total, desc=rule, unit="B", unit_scale=True, disable=None) as bar:
        merge_files(rule, models, out, base, bar.update, **given)
    typer.echo(f"{out}: {rule} of {len(models)} models")


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
