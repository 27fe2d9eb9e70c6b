"""What other libraries compute, stored as tests/peers/*.safetensors for tests/test_peers.py.

The libraries are no dependencies of this project. To write the files again, make an environment of
its own, from the root of a checkout:

    python -m venv peers-venv
    peers-venv/bin/pip install avalanche-lib==0.6.0 clip-benchmark==1.6.2 galore-torch==1.0 \\
        mergekit==0.1.5 open_clip_torch==3.3.0 peft==0.21.2 "numpy<2.4"
    peers-venv/bin/python tests/peers.py

`fusion_bench` needs an older transformers than others may, so give it an environment of its own,
with `fusion-bench==0.2.33 "transformers<5"`. The files that it uses are those of commit 54c9e8c9 of
github.com/tanganke/fusion_bench.

Arguments choose among the files: `python tests/peers.py peft mergekit`. Inputs are integers over a
power of two, drawn by seed, so they are the same on every machine. A file's metadata names the
versions of its libraries. `test_peers.py` imports the settings and the small modules below.
"""

import copy
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Tensors = dict[str, Tensor]
FOLDER = Path(__file__).with_suffix("")


def draw(seed: int, *shape: int, bits: int = 20) -> Tensor:
    """Return integers over 2**bits, from -1 to 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.randint(-(2**bits), 2**bits + 1, shape) / 2**bits


def fill(module: nn.Module, seed: int) -> None:
    """Draw all parameters that train, in place."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for number, parameter in enumerate(trainable):
        parameter.data.copy_(draw(seed + number, *parameter.shape))


def values(module: nn.Module, prefix: str) -> Tensors:
    """Return copies of all parameters by name."""
    return {f"{prefix}/{name}": p.detach().clone() for name, p in module.named_parameters()}


def gradients(module: nn.Module, prefix: str) -> Tensors:
    """Return copies of the gradients of what trains."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return {f"{prefix}/{name}": p.grad.clone() for name, p in trainable if p.grad is not None}


# --- EWC and SI: avalanche, with open_clip's loss --------------------------------------------

IMAGE, TEXT, EMBED, BATCH, BATCHES, TASKS = 6, 5, 4, 4, 3, 3
LEARNING_RATE = 1 / 16
EWC = {"ewc_lambda": 30.0, "mode": "online", "decay_factor": 0.5}
SI_STRENGTH, SI_DAMPING = {"free": 0.0, "held": 1000.0}, 0.5
"""The importances are compared where no penalty acts, the penalty where one does."""
CLIP_TO = 0.001
"""Avalanche lets no importance of SI be above this."""


class Towers(nn.Module):
    """A CLIP of one layer per tower, on samples [B, IMAGE + TEXT]."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(IMAGE, EMBED), nn.Linear(TEXT, EMBED)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        fill(self, 10)
        self.logit_scale.data.fill_(1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = x.split([IMAGE, TEXT], dim=1)
        features = (F.normalize(tower, dim=1) for tower in (self.image(image), self.text(text)))
        return *features, self.logit_scale


def samples(task: int) -> Tensor:
    """Return the samples of a task, [BATCHES * BATCH, IMAGE + TEXT]."""
    return draw(100 + task, BATCHES * BATCH, IMAGE + TEXT)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer whose steps are not proportional to gradients."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)


def clip_loss(output: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
    """Return open_clip's contrastive loss."""
    from open_clip.loss import ClipLoss

    image, text, scale = output
    return ClipLoss()(image, text, scale.exp())


def avalanche_tasks() -> list[Any]:
    """Return the tasks as avalanche's experiences."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset

    sets = []
    for task in range(TASKS):
        x = samples(task)
        data = TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
        data.targets = [0] * len(x)
        sets.append(as_classification_dataset(data))
    return list(benchmark_from_datasets(train=sets).streams["train"])


def avalanche_run(plugin: Any) -> Iterator[tuple[int, Towers]]:
    """Train task by task with a plugin; yield each task's number and the network after it."""
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    model = Towers()
    strategy = Naive(
        model=model,
        optimizer=optimizer_of(model),
        criterion=clip_loss,
        train_mb_size=BATCH,
        train_epochs=1,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    for task, experience in enumerate(avalanche_tasks()):
        strategy.train(experience, shuffle=False, num_workers=0)
        yield task, model


def avalanche_ewc() -> Tensors:
    """Return weights and importances after each task, and the Fisher information by sample."""
    from avalanche.training.plugins import EWCPlugin

    plugin, found = EWCPlugin(**EWC), values(Towers(), "start")
    for task, model in avalanche_run(plugin):
        found |= values(model, f"ewc/weights/{task}")
        for name, importance in plugin.importances[task].items():
            found[f"ewc/importance/{task}/{name}"] = importance.data.clone()
    model, x = Towers(), samples(0)[:BATCH]
    fixed = [feature.detach() for feature in model(x)]

    def own_loss(output: tuple[Tensor, Tensor, Tensor], index: Tensor) -> Tensor:
        """Sample `index` against the batch, whose other features are constants."""
        image, text, scale = output
        images, texts = (one.clone() for one in fixed[:2])
        images[index], texts[index] = image, text
        towards_text, towards_image = image @ texts.T, text @ images.T
        losses = [F.cross_entropy(scale.exp() * x, index) for x in (towards_text, towards_image)]
        return sum(losses) / 2

    labelled = TensorDataset(x, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.long))
    importances = plugin.compute_importances(
        model, own_loss, optimizer_of(model), labelled, "cpu", batch_size=1
    )
    return found | {f"ewc/sample/{name}": x.data.clone() for name, x in importances.items()}


def copying_si() -> type:
    """Return avalanche's SI plugin as it works on a GPU.

    On a CPU, what avalanche 0.6.0 keeps of the weights are views of the parameters, so that they
    never seem to have moved and SI has no effect. Here they are copied after they were taken.
    """
    from avalanche.training.plugins import SynapticIntelligencePlugin

    take = SynapticIntelligencePlugin.extract_weights

    def extract_weights(model: nn.Module, target: dict[str, Any], excluded: set[str]) -> None:
        take(model, target, excluded)
        for kept in target.values():
            kept.data = kept.data.clone()

    SynapticIntelligencePlugin.extract_weights = staticmethod(extract_weights)
    return SynapticIntelligencePlugin


def avalanche_si() -> Tensors:
    """Return weights, path integrals and importances after each task."""
    kind, found = copying_si(), {}
    for run, strength in SI_STRENGTH.items():
        plugin = kind(si_lambda=strength, eps=SI_DAMPING)
        for task, model in avalanche_run(plugin):
            found |= values(model, f"si-{run}/weights/{task}")
            parts = {
                "path": plugin.syn_data["trajectory"],
                "sum": plugin.syn_data["cum_trajectory"],
                "importance": plugin.ewc_data[1],
            }
            for part, by_name in parts.items():
                for name, x in by_name.items():
                    shape = model.get_parameter(name).shape
                    found[f"si-{run}/{part}/{task}/{name}"] = x.data.clone().reshape(shape)
    return found


def avalanche() -> Tensors:
    """EWC and SI over three tasks."""
    return avalanche_ewc() | avalanche_si()


# --- GaLore ----------------------------------------------------------------------------------

MATRICES = {"tall": (10, 6), "wide": (5, 9), "square": (6, 6)}
GALORE = {"rank": 2, "update_proj_gap": 3, "scale": 2.0, "proj_type": "std"}
ADAM = {"lr": 1 / 32, "betas": (0.9, 0.98), "eps": 1e-3, "weight_decay": 0.25}
STEPS = 8


def galore_start() -> Tensors:
    """Return the parameters before the first step."""
    shapes = MATRICES | {"vector": (7,)}
    return {name: draw(200 + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def galore_gradient(name: str, step: int) -> Tensor:
    """Return the gradient of a parameter at a step, which no weight changes."""
    start = galore_start()
    return draw(300 + 10 * step + list(start).index(name), *start[name].shape)


def galore() -> Tensors:
    """Eight steps of GaLoreAdamW, with a new projection after every third."""
    from galore_torch import GaLoreAdamW

    parameters = {name: nn.Parameter(x) for name, x in galore_start().items()}
    groups = [
        {"params": [parameters[name] for name in MATRICES], **GALORE},
        {"params": [parameters["vector"]]},
    ]
    optimizer = GaLoreAdamW(groups, **ADAM, no_deprecation_warning=True)
    found = {}
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = galore_gradient(name, step)
        optimizer.step()
        for name, parameter in parameters.items():
            found[f"{step}/{name}"] = parameter.detach().clone()
            if name in MATRICES and step % GALORE["update_proj_gap"] == 0:
                basis = optimizer.state[parameter]["projector"].ortho_matrix
                basis = basis if name == "wide" else basis.T  # the library keeps rows otherwise
                found[f"basis/{step}/{name}"] = basis.contiguous().clone()
    return found


# --- LoRA, DoRA and VeRA: peft ---------------------------------------------------------------

RANK, SCALE = 3, 1.5


class Layers(nn.Module):
    """A convolution and a linear layer, on images [B, 3, 4, 4]."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 8)
        fill(self, 400)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


class Dense(nn.Module):
    """Two linear layers of different shapes, on [B, 12]; peft's VeRA takes no convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 5), nn.Linear(5, 8)
        fill(self, 420)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def adapter_input(kind: str) -> Tensor:
    """Return the input of the network that gets adapters of a kind."""
    return draw(440, 4, 12) if kind == "vera" else draw(441, 4, 3, 4, 4)


def output_gradient() -> Tensor:
    """Return what the outputs are multiplied with to get a loss, [4, 8]."""
    return draw(442, 4, 8)


def peft_config(kind: str) -> Any:
    """Return peft's config of an adapter."""
    from peft import LoraConfig, VeraConfig

    if kind == "vera":
        return VeraConfig(r=RANK, target_modules=["first", "second"])
    return LoraConfig(
        r=RANK,
        lora_alpha=RANK * SCALE,
        target_modules=["conv", "fc"],
        use_dora=kind == "dora",
    )


def peft_adapter(kind: str) -> Tensors:
    """Return an adapter's start and, at other values, output, gradients and merged weights."""
    from peft import get_peft_model

    torch.manual_seed(450)
    network = Dense() if kind == "vera" else Layers()
    model = get_peft_model(network, peft_config(kind)).train()
    found, prefix = {}, "base_model.model."

    def keep(part: str, tensors: Tensors) -> None:
        for name, x in tensors.items():
            if "_A." in name or "_B." in name or "magnitude" in name or "lambda" in name:
                found[f"{kind}/{part}/{name.partition('/')[2].removeprefix(prefix)}"] = x

    keep("start", values(model, ""))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trainable):
            noise = draw(460 + number, *parameter.shape)
            parameter.copy_(parameter * (1 + noise / 2) if "magnitude" in name else noise)
    keep("value", values(model, ""))
    for name, x in model.named_buffers():
        found[f"{kind}/buffer/{name.rpartition('vera_')[2].partition('.')[0]}"] = x.clone()
    output = model(adapter_input(kind))
    (output * output_gradient()).sum().backward()
    keep("gradient", gradients(model, ""))
    found[f"{kind}/output"] = output.detach()
    for name, layer in network.named_modules():
        if kind != "dora" and hasattr(layer, "get_delta_weight"):
            found[f"{kind}/delta/{name}"] = layer.get_delta_weight("default").detach().clone()
    merged = model.merge_and_unload()
    for name, x in merged.state_dict().items():
        found[f"{kind}/merged/{name}"] = x.detach().clone()
    return found


def peft() -> Tensors:
    """The three kinds of adapters."""
    return {k: x for kind in ("lora", "dora", "vera") for k, x in peft_adapter(kind).items()}


# --- merging: mergekit -----------------------------------------------------------------------

SHAPES = {"a.weight": (12, 10), "a.bias": (16,), "b.weight": (4, 3, 2)}
DENSITY, GAMMA, SUM_SCALE, SHARE = 0.25, 0.125, 0.5, 0.3
"""Whole numbers of entries are kept and dropped of each tensor, and of all three together."""
UNEVEN_DENSITY = 0.3
LINEAR_WEIGHTS = (0.5, 0.3, 0.2)


def base_weights() -> Tensors:
    """Return the weights before the stream."""
    return {name: draw(500 + i, *shape, bits=6) for i, (name, shape) in enumerate(SHAPES.items())}


def tuned_weights(count: int = 3) -> list[Tensors]:
    """Return models that moved partly alike, newest first."""
    models = []
    for number in range(count):
        model = {}
        for index, (name, x) in enumerate(base_weights().items()):
            alike, own = draw(520 + index, *x.shape), draw(540 + 10 * number + index, *x.shape)
            model[name] = x + (alike + own) / 16
        models.append(model)
    return models


def special_weights() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return (newer, older, base) where rules are at their edges."""
    base, one, other = (draw(560 + i, 40) for i in range(3))
    signs = torch.tensor([1.0, -1.0]).repeat(20)
    return {
        "nearly-parallel": (base + one / 64, base, base),  # cosine about 0.9999
        "opposite": (base, -2 * base, base),
        "against": (base + one, base - one / 2 + other / 4, base),
        "one-is-base": (base + one, base, base),
        "no-majority": (base + signs, base - signs, base),
    }


def concatenated(model: Tensors) -> Tensor:
    """Return a model's entries in one vector."""
    return torch.cat([x.reshape(-1) for x in model.values()])


@contextmanager
def recorded_masks() -> Iterator[list[Tensor]]:
    """Within, the list takes what torch.bernoulli draws."""
    masks, draw_mask = [], torch.bernoulli

    def record(*args: Any, **kwargs: Any) -> Tensor:
        masks.append(draw_mask(*args, **kwargs))
        return masks[-1].clone()

    with mock.patch.object(torch, "bernoulli", record):
        yield masks


def mergekit_by_tensor() -> Tensors:
    """Return merges of state dicts, tensor by tensor, as mergekit merges models."""
    from mergekit.merge_methods import merge_state_dicts

    found, base, tuned = {}, base_weights(), tuned_weights()

    def keep(label: str, method: str, models: list[Tensors], **parameters: Any) -> None:
        everything = {"base": base} | {str(i): model for i, model in enumerate(models)}
        merged = merge_state_dicts(everything, method, parameters=parameters, base="base")
        found.update({f"{label}/{name}": x for name, x in merged.items()})

    keep("task_arithmetic", "task_arithmetic", tuned, weight=SUM_SCALE)
    keep("ties", "ties", tuned, weight=1.0, density=DENSITY)
    keep("ties-uneven", "ties", tuned, weight=1.0, density=UNEVEN_DENSITY)
    keep("breadcrumbs", "breadcrumbs", tuned, weight=SUM_SCALE, density=DENSITY, gamma=GAMMA)
    keep("model_stock", "model_stock", tuned)
    keep("model_stock-2", "model_stock", tuned[:2])
    linear = merge_state_dicts(tuned, "linear", parameters={"weight": list(LINEAR_WEIGHTS)})
    slerped = merge_state_dicts(
        {"older": tuned[1], "newer": tuned[0]}, "slerp", parameters={"t": SHARE}, base="older"
    )
    found.update({f"linear/{name}": x for name, x in linear.items()})
    return found | {f"slerp/{name}": x for name, x in slerped.items()}


def mergekit_whole() -> Tensors:
    """Return merges of all entries as one tensor, and of special cases."""
    from mergekit.merge_methods import merge_tensors

    found, base, tuned = {}, base_weights(), tuned_weights()
    vectors = [concatenated(model) for model in (base, *tuned)]
    trims = {"density": DENSITY, "gamma": GAMMA}
    cases = {
        "ties": {"weight": 1.0, "density": DENSITY},
        "breadcrumbs": {"weight": SUM_SCALE, **trims},
        "breadcrumbs_ties": {"weight": 1.0, "normalize": True, **trims},
    }
    for method, parameters in cases.items():
        found[f"whole/{method}"] = merge_tensors(
            vectors, method, parameters=parameters, base_index=0
        )
    found["sum/breadcrumbs_ties"] = merge_tensors(
        vectors, "breadcrumbs_ties", parameters={"weight": 1.0, **trims}, base_index=0
    )
    for case, (newer, older, start) in special_weights().items():
        if case in ("nearly-parallel", "opposite"):
            tensors, method, parameters = [older, newer], "slerp", {"t": SHARE}
        elif case == "no-majority":
            tensors, method = [start, newer, older], "ties"
            parameters = {"weight": 1.0, "density": 1.0}
        else:
            tensors, method, parameters = [start, newer, older], "model_stock", {}
        found[f"special/{case}"] = merge_tensors(
            tensors, method, parameters=parameters, base_index=0
        )
    return found


def mergekit_dare() -> Tensors:
    """Return DARE's masks and merges, as the paper rescales and as mergekit does by default."""
    from mergekit.merge_methods import merge_tensors

    found, base, tuned = {}, base_weights(), tuned_weights()
    as_in_paper = {"density": DENSITY, "rescale": False, "lambda": 1 / DENSITY}
    cases = {
        "dare": ("dare_linear", as_in_paper | {"weight": SUM_SCALE}),
        "dare-ties": ("dare_ties", as_in_paper | {"weight": 1.0, "normalize": True}),
        "dare-default": ("dare_linear", {"density": DENSITY, "weight": SUM_SCALE}),
    }
    for case, (method, parameters) in cases.items():
        for name, x in base.items():
            tensors = [x, *(model[name] for model in tuned)]
            torch.manual_seed(580)
            with recorded_masks() as masks:
                found[f"{case}/{name}"] = merge_tensors(
                    tensors, method, parameters=parameters, base_index=0
                )
            found[f"mask/{name}"] = torch.stack(masks)  # the same in all cases
    return found


def mergekit() -> Tensors:
    """The merge rules that both sides have."""
    return mergekit_by_tensor() | mergekit_whole() | mergekit_dare()


# --- merging matrices: fusion_bench ----------------------------------------------------------

PROTECTED = (0.5, 0.2)
"""Parts of the sum of singular values that OPCM protects."""


class Maps(nn.Module):
    """Linear maps that are wide, tall and small, a normalisation and a table of embeddings."""

    def __init__(self, seed: int):
        super().__init__()
        self.wide, self.tall = nn.Linear(12, 7), nn.Linear(5, 9, bias=False)
        self.small = nn.Linear(4, 1, bias=False)
        self.norm, self.embedding = nn.LayerNorm(6), nn.Embedding(8, 6)
        fill(self, seed)


def maps() -> list[Maps]:
    """Return models, newest first, and last the one from which they were trained."""
    return [Maps(seed) for seed in (600, 620, 640, 660)]


class Pool:
    """Models as fusion_bench reads them, oldest first."""

    def __init__(self, models: list[Maps], base: Maps):
        self.models = {str(number): model for number, model in enumerate(reversed(models))}
        self.base, self.model_names = base, list(self.models)

    def load_pretrained_model(self) -> Maps:
        """Return a copy of the base."""
        return copy.deepcopy(self.base)

    def load_model(self, name: str) -> Maps:
        """Return a copy of a model."""
        return copy.deepcopy(self.models[name])


def fusion_bench() -> Tensors:
    """OPCM and TSV-Merge of three models, and of two."""
    from fusion_bench.method.opcm.opcm_general import OPCM
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    found, (*models, base) = {}, maps()
    for count in (3, 2):
        for protect in PROTECTED:
            method = OPCM(alpha=protect, shuffle_order=False, save_on_every_step=False)
            merged = method.run(Pool(models[:count], base)).state_dict()
            found |= {f"opcm-{count}-{protect}/{name}": x for name, x in merged.items()}
        start = base.state_dict()
        taus = [{name: x - start[name] for name, x in m.state_dict().items()} for m in models]
        for label, excluded in (("tsv", ["embedding.weight"]), ("tsv-tables", [])):
            moved = TSVM_utils.compute_and_sum_svd_mem_reduction(
                taus[:count], exclude_keys=excluded, accelerator=torch.device("cpu")
            )
            found |= {f"{label}-{count}/{name}": start[name] + x for name, x in moved.items()}
    return found


# --- zero-shot evaluation: CLIP_benchmark ----------------------------------------------------

CLASSES, PICTURES, WIDTH, RECALLS = 7, 60, 8, (1, 5)


class Lookup(nn.Module):
    """A network whose images are features already, and whose texts are rows of a table."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = table

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return the rows that tokens name."""
        return self.table[tokens]


def tokenize(texts: list[str]) -> Tensor:
    """Return the numbers at the ends of texts."""
    return torch.tensor([int(text.split()[-1]) for text in texts])


def classification_features() -> tuple[Tensor, Tensor, Tensor]:
    """Return features of images and class prompts, not of unit length, and labels."""
    label = torch.arange(PICTURES) % CLASSES
    text = draw(600, CLASSES, WIDTH)
    return text[label] + draw(601, PICTURES, WIDTH), text, label


def retrieval_features() -> tuple[Tensor, Tensor, Tensor]:
    """Return features of images and captions, one to four of each image, and whose they are."""
    image = draw(610, PICTURES, WIDTH)
    owner = torch.arange(PICTURES).repeat_interleave(torch.arange(PICTURES) % 4 + 1)
    return image, image[owner] + draw(611, len(owner), WIDTH), owner


def clip_benchmark() -> Tensors:
    """Answers and scores of a classification and a retrieval set."""
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    image, text, label = classification_features()
    model, names = Lookup(text), [str(number) for number in range(CLASSES)]
    loader = DataLoader(TensorDataset(image, label), batch_size=16)
    classifier = zeroshot_classification.zero_shot_classifier(
        model, tokenize, names, ["a photo of {c}"], "cpu", amp=False
    )
    logits, target = zeroshot_classification.run_classification(
        model, classifier, loader, "cpu", amp=False
    )
    [top] = zeroshot_classification.accuracy(logits, target)
    found = {"top1": torch.tensor(top), "answer": logits.argmax(1)}
    image, text, owner = retrieval_features()
    own_texts = [[f"text {i}" for i in (owner == n).nonzero()[:, 0].tolist()] for n in range(60)]
    batches = [(image[at : at + 16], own_texts[at : at + 16]) for at in range(0, PICTURES, 16)]
    scores = zeroshot_retrieval.evaluate(
        Lookup(text), batches, tokenize, "cpu", amp=False, recall_k_list=list(RECALLS)
    )
    found |= {name: torch.tensor(score) for name, score in scores.items()}
    similarity = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    own = owner[:, None] == torch.arange(PICTURES)
    for k in RECALLS:
        for part, x, y in (("to-image", similarity, own), ("to-text", similarity.T, own.T)):
            found[f"{part}@{k}"] = zeroshot_retrieval.recall_at_k(x, y, k) > 0
    return found


MAKERS: dict[str, tuple[Callable[[], Tensors], tuple[str, ...]]] = {
    "avalanche": (avalanche, ("avalanche-lib", "open_clip_torch")),
    "clip_benchmark": (clip_benchmark, ("clip-benchmark",)),
    "fusion_bench": (fusion_bench, ("fusion-bench",)),
    "galore": (galore, ("galore-torch",)),
    "mergekit": (mergekit, ("mergekit",)),
    "peft": (peft, ("peft",)),
}
"""File -> what makes it, and the libraries that do."""


def main(names: list[str]) -> None:
    """Write some of the files, or all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or MAKERS:
        make, libraries = MAKERS[name]
        tensors = {key: x.detach().contiguous() for key, x in make().items()}
        assert all(x.isfinite().all() for x in tensors.values() if x.is_floating_point())
        versions = {each: importlib.metadata.version(each) for each in (*libraries, "torch")}
        path = FOLDER / f"{name}.safetensors"
        save_file(tensors, path, metadata={"versions": json.dumps(versions)})  # one key: one order
        print(f"{path.name}: {len(tensors)} tensors, {math.ceil(path.stat().st_size / 1000)} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
