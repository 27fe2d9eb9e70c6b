"""Keep a CLIP model up to date: the book's recipe as one loop of plain PyTorch.

    python book/recipe.py        # a small network and five deliveries, on a laptop
    python book/recipe.py gpu    # the paper's network and data, on a graphics card

Only the data, the network and the scores come from our package.
"""

import math
import sys

import numpy as np
import torch
from torch.nn import functional as F

import cmp
from cmp.config import read_config
from cmp.data import normalise, to_rgb
from cmp.models import preprocessing, tokenizer

# %% The size of the run, and the learning rate to tune first for your own network

profile = sys.argv[1] if len(sys.argv) > 1 else "quick"
device = "cuda" if profile == "gpu" else "cpu"
peak = 1e-5 if profile == "gpu" else 0.0048

# %% The data, what each delivery may draw from, and the network you serve today

config = read_config(profile)
steps, batch = config.training.steps, config.training.batch
corpus = cmp.load_data(config.data)
deliveries = cmp.task_pools(config, corpus)
network = cmp.load_model(config.model, seed=0).to(device).train()
visual, tokenize = network.visual, tokenizer(config.model.name)
images = corpus.images
if corpus.in_files:  # photographs, cropped as the network wants them
    images = images.at(preprocessing(network))

# %% A batch: a quarter of pretraining data, a quarter new, half of earlier deliveries


def draw_batch(month, step):
    """Return the pictures and captions of a batch, as pixels and tokens."""
    pools, random = deliveries[month], np.random.default_rng([month, step])
    shares = (0.25, 0.25, 0.5) if month else (0.5, 0.5, 0)  # nothing is earlier yet
    parts = zip((pools.pretraining, pools.update, pools.buffer), shares, strict=True)
    rows = [random.choice(pool, int(n * batch), replace=False) for pool, n in parts]
    rows = np.concatenate(rows)
    captions = [random.choice(corpus.captions(row)) for row in rows]
    pixels = normalise(to_rgb(images[rows]), visual.image_mean, visual.image_std)
    return pixels.to(device), tokenize(captions).to(device)


# %% The learning rate: a tenth of the steps up to the peak, then down half a cosine


def rate(step):
    """Return the learning rate of a step. Each delivery begins with step 0 again."""
    warmup = math.ceil(steps / 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step + 1 - warmup) / (steps - warmup)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * done)) / 2)


# %% The scores: A_KA for what deliveries bring, A_ZS for what the network knew before


def score(month):
    """Print and return the network's scores after some months."""
    subset = config.evaluation.subset
    scores = cmp.evaluate(network, config.model.name, corpus, subset=subset).summary()
    print(f"month {month}: A_KA {scores['A_KA']:.1f}, A_ZS {scores['A_ZS']:.1f}")
    return scores


# %% One optimiser for all deliveries, and the weights you serve

matrices = [x for x in network.parameters() if x.ndim > 1]
vectors = [x for x in network.parameters() if x.ndim < 2]  # which are not decayed
optimizer = torch.optim.AdamW(
    [{"params": matrices}, {"params": vectors, "weight_decay": 0}],
    betas=(config.optimizer.beta1, config.optimizer.beta2),
    weight_decay=config.optimizer.weight_decay,
)
served = {name: x.clone() for name, x in network.state_dict().items()}
way = [score(0)]

# %% The loop

for month in range(len(deliveries)):
    for step in range(steps):
        pixels, tokens = draw_batch(month, step)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            image, text, scale = network(pixels, tokens).values()  # unit features
        logits, own = scale * image @ text.T, torch.arange(batch, device=device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        with torch.no_grad():
            network.logit_scale.clamp_(0, math.log(100))  # CLIP's own bounds
    trained = network.state_dict()
    served = {name: served[name].lerp(trained[name], 0.25) for name in served}
    network.load_state_dict(served)  # the next delivery trains what you serve
    way.append(score(month + 1))
