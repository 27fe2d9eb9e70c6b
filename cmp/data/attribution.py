"""ATTRIBUTION.md, made from the manifests: who drew what, under which licence."""

from cmp.data.manifest import Dataset, Package

HEAD = """# Attribution of the data

Made by `cmp data attribution` from `data_manifests/packages.yaml`. The packages are fetched when
data are built; their content is not part of this repository. The weights in `cmp/weights` were
trained on the sets below whose role is *pool*.

| source | licence | package | used in |
|---|---|---|---|
"""


def attribution(packages: dict[str, Package], datasets: dict[str, Dataset]) -> str:
    """The text of the file: a row a package."""
    rows = []
    for name, package in packages.items():
        used = ", ".join(d.name for d in datasets.values() if name in d.sources)
        source = f"{package.attribution} ({package.url})"
        where = f"`{package.package}` {package.version}"
        rows.append(f"| {source} | {package.licence} | {where} | {used} |")
    return HEAD + "\n".join(rows) + "\n"
