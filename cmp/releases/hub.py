"""Write a run's model as a folder for the Hugging Face hub, in open_clip's layout.

`open_clip.create_model_from_pretrained` loads it as "local-dir:FOLDER", or as "hf-hub:ORG/NAME"
once the folder is uploaded. The model card is made from the stored run.
"""

from pathlib import Path

import pandas as pd

from cmp import budgets, models, starts
from cmp.data import Corpus
from cmp.readers import notes
from cmp.releases.card import fill_card
from cmp.releases.exports import export_folder
from cmp.releases.hugging_face import TOKENIZER_FILES
from cmp.releases.release import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, write_served_model
from cmp.runs import preflight, store

FILES = {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, *TOKENIZER_FILES}
"""All files of an export, besides the record of their hashes."""


def write_hub_folder(
    run: store.StoredRun, model: models.Network, corpus: Corpus, folder: Path
) -> None:
    """Write a run's model, its config, its tokenizer and its card atomically.

    Args:
        run: The run.
        model: The run's model, see `cmp.runs.lookup.find_model`.
        corpus: The run's data, for their licences.
        folder: The folder. It is replaced if it contains nothing but an earlier export.

    Raises:
        CmpError: The folder contains other or changed files, or cannot be written.
    """
    with export_folder(folder, FILES) as partial:
        write_served_model(model, run.config.model.name, partial)
        (partial / CARD_FILE).write_text(model_card(run, corpus), encoding="utf-8")


def read_differently(run: store.StoredRun) -> list[str]:
    """Report images of a run's data that open_clip's own transform reads differently.

    Args:
        run: The run; its provenance counts these images.
    """
    sentences = notes.describe_differences(run.provenance.get("pictures", {}))
    if run.config.model.name in starts.family_names():
        sentences.append(
            "transparent parts of embedded images were evaluated over white, but open_clip's own "
            "transform drops the transparency: put images over white first"
        )
    return sentences


def model_card(run: store.StoredRun, corpus: Corpus) -> str:
    """Return the model card of a run, in Markdown.

    Args:
        run: The run.
        corpus: The run's data.
    """
    about, scope = run.config, "full" if (run.metrics["scope"] == "full").any() else "subset"
    data = [(n, x.role, getattr(x, "licence", "unknown")) for n, x in corpus.datasets.items()]
    tasks = run.metrics["task"].max()  # those done, of a run that is not finished
    steps = budgets.settle(about, corpus).steps[:tasks]
    return fill_card(
        about, corpus, run.provenance, run=run.id, tasks=tasks, scope=scope,
        steps=preflight.steps_in_words(steps), differences=read_differently(run),
        scores=_scores(run.metrics[run.metrics["scope"] == scope]),
        data=pd.DataFrame(data, columns=["", "role", "licence"]),
    )  # fmt: skip


def _scores(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the scores before and after the stream, one row per dataset and aggregate."""
    ends = metrics[metrics["task"].isin([0, metrics["task"].max()])]
    columns = {0: "before", metrics["task"].max(): "after"}
    table = ends.pivot(index=["role", "dataset"], columns="task", values="score")
    table = table.rename(columns=columns).reset_index("role")
    means = store.trajectory(ends).set_index("task")[["A_KA", "A_ZS"]].T.rename(columns=columns)
    table = pd.concat([means.assign(role=""), table])[["role", "before", "after"]].round(1)
    return table.rename_axis("").reset_index()
