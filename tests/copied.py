"""What the forms that a reader copies from an explorer compute."""

import shlex
from types import SimpleNamespace

from cmp import config
from cmp.runs import launch
from lab import chapters


def computed_by(form, text, size, folder, source):
    """The config of the run that a copied form computes."""
    if form == "command":
        words = shlex.split(text.replace("\\\n", ""))  # as a shell joins lines
        assert words[:2] == ["cmpt", "run"]
        return config.read_config(words[2], words[3:])
    if form == "YAML":
        (folder / "copied.yaml").write_text(text)
        return config.read_config(str(folder / "copied.yaml"))
    given = {}
    if form == "Python":
        run = SimpleNamespace(run=lambda what, **more: given.update(config=(what, more)))
        exec(text, {"cmp": run})
    else:
        words = shlex.split(text)
        assert words[:5] == ["cmpt", "book", "--chapter", source.stem[:2], "--profile"]
        values = dict(word.split("=") for word in words[6:] if word != "-P")
        scope = chapters.check_parameters(source, values | {"profile": words[5]})
        cells = [cell.source for cell in chapters.notebook(source).cells]
        before = [
            line for cell in cells for line in cell.split("\n") if line.startswith("mixture = ")
        ]
        [cell] = ["\n".join([*before, each]) for each in cells if "mine = cmp.run(" in each]
        scope |= {"others": None, "figures": SimpleNamespace(plot_among_runs=lambda *_: None)}
        run = SimpleNamespace(run=lambda what, _, **more: given.update(config=(what, more)))
        exec(cell, scope | {"cmp": run})
    what, more = given["config"]
    return launch.from_keywords(what, more)
