"""What the package's code never does: unpickle, evaluate, unpack to disk, draw from chance."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cmp
from tests import lock

ROOT = Path(cmp.__file__).parents[1]
SOURCES = [path for room in ("cmp", "book/lab") for path in sorted((ROOT / room).rglob("*.py"))]
FETCHES = "cmp/embedded/"
"""The room that may use the network: it fetches the benchmark's packages."""

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
NETWORK_MODULES = {
    *("urllib", "urllib3", "requests", "http", "httpx", "aiohttp", "socket", "socketserver"),
    *("ftplib", "smtplib", "telnetlib", "ssl", "huggingface_hub"),
}
FORBIDDEN_CALLS = {
    "joblib.dump": "pickles",
    "joblib.load": "unpickles",
    "torch.load": "unpickles; use safetensors",
    "torch.save": "pickles; use safetensors",
    "torch.hub.load": "runs code from the network",
    "torch.seed": "draws a seed from the system",
    "pandas.read_pickle": "unpickles",
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "subprocess.getoutput": "starts a shell",
    "subprocess.getstatusoutput": "starts a shell",
    "tempfile.mktemp": "names a file that another may make first",
    "shutil.unpack_archive": "unpacks wherever the archive says",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds many objects",
    "yaml.load_all": "takes a loader for each document; read one",
    "yaml.unsafe_load_all": "builds any object",
    "yaml.full_load_all": "builds many objects",
}
FORBIDDEN_METHODS = {
    "extractall": "unpacks wherever the archive says",
    "extract": "unpacks wherever the archive says",
    "to_pickle": "pickles",
}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
NUMPY_RANDOM = {
    *("Generator", "SeedSequence", "BitGenerator", "Philox", "PCG64", "PCG64DXSM", "SFC64"),
}  # classes that hold their own state; without a seed in the call they are refused as well
TORCH_DRAWS = {
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
}
IN_PLACE_DRAWS = {
    *("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_"),
}
TORCH_SEEDS = {"torch.manual_seed", "torch.random.manual_seed", "torch.cuda.manual_seed_all"}

EXCEPTIONS = {
    # (file, rule): why this one is right
    ("cmp/sources.py", "code"): "compiles a file that was imported, and runs nothing",
    ("cmp/starts.py", "network"): "asks the hub's package what lies in its cache",
    (
        "cmp/experiments/cluster.py",
        "network",
    ): "asks whether the cluster that the user named answers",
    ("book/lab/printing.py", "network"): "hands the built site to the browser that prints it",
    ("cmp/models.py", "global-seed"): "within torch.random.fork_rng, which puts the state back",
    ("cmp/seeds.py", "global-seed"): "within torch.random.fork_rng, which puts the state back",
    ("cmp/embedded/models.py", "global-draw"): "initial weights, only made under fork_rng",
}


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each name that is bound by an import stands for: np -> numpy."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """`numpy.random.seed` for `np.random.seed`; empty for what is no name from an import."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id if not parts else f"?{node.id}"), *parts[::-1]])


def modules_of(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def import_faults(node: ast.AST, networked: bool) -> Iterator[tuple[str, str]]:
    """(rule, what is wrong) with an import statement."""
    for module in modules_of(node):
        top = module.split(".")[0]
        if top in UNSAFE_MODULES:
            yield "unsafe-module", f"import of {module}: its data run code as they are read"
        if top == "random":
            yield "global-random", f"import of {module}: use cmp.seeds"
        if module.startswith("numpy.random.") and module.split(".")[2] not in NUMPY_RANDOM:
            yield "global-random", f"import of {module}: use cmp.seeds"
        if top in NETWORK_MODULES and not networked:
            yield "network", f"import of {module}: only cmp.embedded fetches"


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    """The value of a keyword argument, if it is given."""
    return next((argument.value for argument in call.keywords if argument.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def random_faults(call: ast.Call, name: str) -> Iterator[tuple[str, str]]:
    """(rule, what is wrong) with a call that draws or seeds."""
    module, _, function = name.rpartition(".")
    if module == "random":
        yield "global-random", f"{name}: use cmp.seeds"
    if module == "numpy.random" and function not in NUMPY_RANDOM:
        yield "global-random", f"{name}: use cmp.seeds"
    if module == "numpy.random" and function in NUMPY_RANDOM and not (call.args or call.keywords):
        yield "global-random", f"{name} without a seed"
    if name in TORCH_SEEDS:
        yield "global-seed", f"{name}: use cmp.seeds"
    in_place = isinstance(call.func, ast.Attribute) and call.func.attr in IN_PLACE_DRAWS
    if in_place or (module == "torch" and function.removesuffix("_like") in TORCH_DRAWS):
        given = keyword(call, "generator")
        if given is None or is_constant(given, None):
            yield "global-draw", f"{name or call.func.attr} without generator="


def call_faults(call: ast.Call, names: dict[str, str], safe: set[str]) -> Iterator[tuple[str, str]]:
    """(rule, what is wrong) with a call; safe: the classes of this file that are safe loaders."""
    name = full_name(call.func, names)
    if name in FORBIDDEN_BUILTINS or name.removeprefix("builtins.") in FORBIDDEN_BUILTINS:
        yield "code", f"{name}: runs or makes code"
    if name in FORBIDDEN_CALLS:
        yield "forbidden-call", f"{name}: {FORBIDDEN_CALLS[name]}"
    if isinstance(call.func, ast.Attribute) and call.func.attr in FORBIDDEN_METHODS:
        yield "forbidden-method", f".{call.func.attr}: {FORBIDDEN_METHODS[call.func.attr]}"
    if (shell := keyword(call, "shell")) is not None and not is_constant(shell, False):
        yield "shell", "shell= other than False"
    pickles = keyword(call, "allow_pickle")
    if pickles is not None and not is_constant(pickles, False):
        yield "pickle", "allow_pickle other than False"
    if name == "numpy.load" and len(call.args) > 2:
        yield "pickle", "numpy.load: allow_pickle by position"
    if name == "yaml.load":
        given = call.args[1] if len(call.args) > 1 else keyword(call, "Loader")
        if given is None or full_name(given, names) not in safe:
            yield "yaml", "yaml.load without a safe loader"
    yield from random_faults(call, name)


def safe_loaders(tree: ast.AST, names: dict[str, str]) -> set[str]:
    """The safe loaders of yaml, and the classes here that are made from one of them alone."""
    return SAFE_LOADERS | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and [full_name(base, names) in SAFE_LOADERS for base in node.bases] == [True]
    }


def faults(source: str, where: str, networked: bool = False) -> list[tuple[str, str]]:
    """(rule, "file:line: what is wrong") for each fault of a file."""
    tree = ast.parse(source)
    names = imported_names(tree)
    safe = safe_loaders(tree, names)
    sentences = []
    for node in ast.walk(tree):
        these = list(import_faults(node, networked))
        if isinstance(node, ast.Call):
            these += call_faults(node, names, safe)
        sentences += [(rule, f"{where}:{node.lineno}: {what}") for rule, what in these]
    return sentences


def package_faults() -> list[tuple[tuple[str, str], str]]:
    """((file, rule), sentence) for each fault of the project."""
    sentences = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        sentences += [
            ((name, rule), what) for rule, what in faults(text, name, name.startswith(FETCHES))
        ]
    return sentences


def test_the_package_does_none_of_it_but_for_exceptions_that_are_still_needed():
    sentences = package_faults()
    assert [what for key, what in sentences if key not in EXCEPTIONS] == []
    assert {key for key, _ in sentences if key in EXCEPTIONS} == set(EXCEPTIONS)


def test_seeding_is_within_a_fork_that_puts_the_state_back():
    seeds, inside = set(), set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if "seed" not in text:
            continue
        tree = ast.parse(text)
        forked = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and "fork_rng" in ast.unparse(node.items[0])
        ]
        seeds |= {(path, call.lineno) for call in ast.walk(tree) if is_seed(call)}
        inside |= {
            (path, call.lineno) for node in forked for call in ast.walk(node) if is_seed(call)
        }
    assert inside == seeds != set()


def is_seed(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and full_name(node.func, {"torch": "torch"}) in TORCH_SEEDS


OFFENCES = [
    ("import pickle", "unsafe-module"),
    ("import pickle as p", "unsafe-module"),
    ("from pickle import loads", "unsafe-module"),
    ("def f():\n    import dill", "unsafe-module"),
    ("import shelve", "unsafe-module"),
    ("import marshal", "unsafe-module"),
    ("from joblib import dump\ndump(1, 'x')", "forbidden-call"),
    ("import joblib\njoblib.load('x')", "forbidden-call"),
    ("import torch\ntorch.load('x')", "forbidden-call"),
    ("import torch as t\nt.save({}, 'x')", "forbidden-call"),
    ("from torch import load\nload('x', weights_only=True)", "forbidden-call"),
    ("import pandas as pd\npd.read_pickle('x')", "forbidden-call"),
    ("table.to_pickle('x')", "forbidden-method"),
    ("import numpy as np\nnp.load('x', allow_pickle=True)", "pickle"),
    ("import numpy as np\nnp.load('x', None, True)", "pickle"),
    ("from numpy import load\nload('x', allow_pickle=flag)", "pickle"),
    ("eval('1')", "code"),
    ("exec(text)", "code"),
    ("compile(text, 'x', 'exec')", "code"),
    ("import builtins\nbuiltins.eval('1')", "code"),
    ("__import__('os')", "code"),
    ("archive.extractall()", "forbidden-method"),
    ("with tarfile.open(p) as t:\n    t.extract('x')", "forbidden-method"),
    ("import shutil\nshutil.unpack_archive('x')", "forbidden-call"),
    ("import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
    ("run('ls', shell=flag)", "shell"),
    ("import os\nos.system('ls')", "forbidden-call"),
    ("from os import popen\npopen('ls')", "forbidden-call"),
    ("import random\nrandom.random()", "global-random"),
    ("from random import choice", "global-random"),
    ("import numpy as np\nnp.random.seed(0)", "global-random"),
    ("import numpy as np\nnp.random.rand(3)", "global-random"),
    ("import numpy as np\nnp.random.default_rng()", "global-random"),
    ("import numpy as np\nnp.random.Philox()", "global-random"),
    ("from numpy.random import shuffle", "global-random"),
    ("from numpy import random\nrandom.shuffle(x)", "global-random"),
    ("import torch\ntorch.manual_seed(0)", "global-seed"),
    ("import torch\ntorch.random.manual_seed(0)", "global-seed"),
    ("import torch\ntorch.rand(3)", "global-draw"),
    ("import torch\ntorch.randperm(3, generator=None)", "global-draw"),
    ("import torch\ntorch.randn_like(x)", "global-draw"),
    ("weights.uniform_(-1, 1)", "global-draw"),
    ("import torch\ntorch.empty(3).normal_()", "global-draw"),
    ("from torch import randint\nrandint(0, 3, (2,))", "global-draw"),
    ("import urllib.request", "network"),
    ("from urllib.request import urlopen", "network"),
    ("import requests", "network"),
    ("import http.client", "network"),
    ("import socket", "network"),
    ("def f():\n    from huggingface_hub import hf_hub_download", "network"),
    ("import yaml\nyaml.load(text)", "yaml"),
    ("import yaml\nyaml.load(text, yaml.Loader)", "yaml"),
    ("import yaml\nyaml.load(text, Loader=yaml.FullLoader)", "yaml"),
    ("import yaml\nclass L(yaml.Loader): pass\nyaml.load(text, L)", "yaml"),
    ("import yaml\nclass L(yaml.SafeLoader, Other): pass\nyaml.load(text, L)", "yaml"),
    ("from yaml import load\nload(text)", "yaml"),
    ("import yaml\nyaml.unsafe_load(text)", "forbidden-call"),
    ("import tempfile\ntempfile.mktemp()", "forbidden-call"),
]


def test_each_offence_is_caught_with_file_and_line():
    for source, rule in OFFENCES:
        sentences = faults(f"\n{source}", "cmp/x.py")
        assert rule in [name for name, _ in sentences], source
        lines = source.splitlines()
        assert f"cmp/x.py:{1 + len(lines)}: " in " ".join(what for _, what in sentences), source


HARMLESS = [
    "model.eval()",
    "import re\nre.compile('x')",
    "import torch\ntorch.compile(model)",
    "store.load('x')",
    "from cmp.runs import store\nstore.load('x')",
    "loader.load(text)",
    "def load(x): ...\nload('x')",
    "import numpy as np\nnp.load('x')",
    "import numpy as np\nnp.load('x', mmap_mode='r', allow_pickle=False)",
    "import yaml\nyaml.load(text, yaml.SafeLoader)",
    "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load(text, L)",
    "import yaml\nyaml.safe_load(text)",
    "import ast\nast.literal_eval('1')",
    "archive.extractfile('x').read()",
    "import subprocess\nsubprocess.run(['ls'], shell=False)",
    "import subprocess\nsubprocess.run(['ls'])",
    "import numpy as np\nnp.random.Generator(np.random.Philox(key=3))",
    "def draw(rng: 'np.random.Generator'): return rng.random(3)",
    "random = streams.ORDERS['random']\nrandom(classes, 0)",
    "from cmp import streams\nstreams.random(classes, 0)",
    "import torch\ntorch.rand(3, generator=generator)",
    "weights.uniform_(-1, 1, generator=generator)",
    "import torch\ntorch.Generator().manual_seed(0)",
    "import tempfile\ntempfile.mkdtemp()",
    "from cmp.http import x",
    "from . import pickle_jar",
    "httpd = 'http://example.org'",
]


def test_what_only_looks_alike_is_let_through():
    for source in HARMLESS:
        assert faults(source, "cmp/x.py") == [], source


def test_only_the_room_that_fetches_may_use_the_network():
    assert faults("import socket", f"{FETCHES}x.py", networked=True) == []


def test_every_file_is_looked_at():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"cmp/files.py", "cmp/cli/results.py", "book/lab/site.py"} <= names


def test_every_third_party_is_pinned_by_version_and_sha256():
    """All that pyproject.toml and the Makefile install; an install refuses what is not listed."""
    entries = lock.read_lock(lock.LOCK.read_text())
    tree = tomllib.loads((lock.ROOT / "pyproject.toml").read_text())
    project = tree["project"]
    needs = [*tree["build-system"]["requires"], *lock.TOOLS.split(), *project["dependencies"]]
    needs += [need for extra in project["optional-dependencies"].values() for need in extra]
    for need in map(Requirement, needs):
        version, _, hashes = entries[canonicalize_name(need.name)]
        assert need.specifier.contains(version), need
        assert hashes, need
    assert all(hashes for _, _, hashes in entries.values())
    makefile = (lock.ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if line.startswith("\t$(PIP_INSTALL)")]
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)
