"""The command `export`, which writes models for other libraries."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cmp.cli import shared
from cmp.errors import CmpError
from cmp.files import SHORT_ID, atomic_file

if TYPE_CHECKING:
    from cmp.models import Network
    from cmp.releases.exports import Export
    from cmp.runs.store import StoredRun


def export(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL")],
    out: shared.OutFile,
    to: Literal["open_clip", "hf", "transformers", "onnx"] = "open_clip",
) -> None:
    """Export a release, a run's final weights, or a model from a hub, for other libraries.

    For an unfinished run, the model after its last finished update is exported. Exports for
    transformers and ONNX are compared with the network, and kept only if the features agree to
    1e-5. An earlier export is replaced, unless it has changed.

    Args:
        model: Id of a run or its first digits, or a model with weights: NAME:START,
            hf-hub:ORG/NAME, or a folder as open_clip writes it, such as a release.
        out: File to write, NAME.safetensors, for open_clip; otherwise a folder.
        to: Format: open_clip; hf, a folder for the Hugging Face hub with a model card, which
            open_clip loads; transformers, for CLIPModel; or onnx, one file for images and one
            for texts.

    Example:
        cmpt export 3f2a -o new.safetensors
    """
    from cmp import models, starts
    from cmp.data import load_data
    from cmp.readers import notes
    from cmp.releases import exports, hub, hugging_face, onnx_files
    from cmp.releases.candidates import find_candidate, is_run
    from cmp.releases.release import is_release, read_release
    from cmp.runs.lookup import find_model

    exporters = {"transformers": hugging_face.export_transformers, "onnx": onnx_files.export_onnx}
    files = {"hf": hub.FILES, "transformers": hugging_face.FILES, "onnx": onnx_files.FILES}
    shared.check_out(out)
    if to == "open_clip" and out.suffix != ".safetensors":
        raise CmpError(
            f"{out}: use a name that ends in .safetensors, since open_clip recognises the format "
            "by it"
        )
    if to == "open_clip":
        exports.check_file(out)
    else:
        exports.check_folder(out, files[to])
    folder = Path(model.removeprefix("local-dir:"))
    if is_run(model) and not Path(model).exists():
        run, network = find_model(model.removeprefix(starts.RUN_PREFIX))
        name = run.config.model.name
        report_unfinished(run)
    elif to == "hf":
        raise CmpError(
            f"--to hf: {model}: a model card describes a run, so give the id of a run, or choose "
            "another format; a release is such a folder already, so upload it as it is"
        )
    else:
        run, (_, name, network) = None, find_candidate(model)
    if to in exporters:
        print_export(exporters[to](name, network, out), out)
    elif to == "hf":
        hub.write_hub_folder(run, network, load_data(run.config.data), out)
        loading = f'open_clip.create_model_from_pretrained("local-dir:{out}")'
        typer.echo(f"written: {out}\nmodel, preprocess = {loading}")
    else:
        with atomic_file(out) as partial:
            models.export_weights(network, partial)
        typer.echo(f"written: {out}\n{loading_code(name, network, out)}")
    if (family := starts.family_of(name)) and to not in exporters:
        typer.echo(f"import {family.__name__} first, so that open_clip knows this model")
    if run:
        sentences = hub.read_differently(run)
    else:
        provenance = read_release(folder).record.provenance if is_release(folder) else {}
        sentences = notes.describe_differences(provenance.get("pictures", {}))
    for sentence in sentences:
        typer.echo(f"note: {sentence}")


def report_unfinished(run: "StoredRun") -> None:
    """Print a note if an exported run is not finished."""
    done = run.metrics["task"].max()
    if done < (tasks := run.config.stream.tasks):
        words = f"is not finished: this is its model after {done} of {tasks} updates"
        typer.echo(f"run {run.id[:SHORT_ID]} {words}")


def print_export(written: "Export", out: Path) -> None:
    """Print how to load an export whose features were checked, and what is missing."""
    image, text = written.differences
    typer.echo(f"written: {out}\n{written.loading}")
    words = f"differ from the network's by at most {image:.1g} (images) and {text:.1g} (texts)"
    typer.echo(f"checked: features {words}")
    for sentence in written.notes:
        typer.echo(f"note: {sentence}")


def loading_code(name: str, model: "Network", file: Path) -> str:
    """Return Python code with which open_clip loads exported weights and prepares images."""
    from cmp import models, starts
    from cmp.data import Preprocessing

    call = f"model, _, preprocess = open_clip.create_model_and_transforms({name!r}, "
    if starts.is_hub(name):
        return f"{call}load_weights=False)\nopen_clip.load_checkpoint(model, {str(file)!r})"
    usual, own = (asdict(how) for how in (Preprocessing(), models.preprocessing(model)))
    keys = ("mean", "std", "interpolation", "resize_mode")  # the only ones with arguments
    changes = [f", image_{key}={own[key]!r}" for key in keys if own[key] != usual[key]]
    return f"{call}pretrained={str(file)!r}{''.join(changes)})"
