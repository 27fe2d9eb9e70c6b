"""Models: ordinary open_clip, with split attention, a compact vocabulary and safe weights."""

import copy
import functools
import gzip
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import open_clip
import options
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from cmp import cli, config, evaluation, models, starts
from cmp.config import Model
from cmp.embedded import models as embedded_models
from cmp.errors import CmpError
from cmp.files import DIGESTS
from cmp.project import project_folder
from cmp.runs import preflight
from cmp.training import make_train_state


def open_clip_attention(name, seed):
    """The same weights with open_clip's own fused attention, and with ours."""
    return models.create_fused_model(name, seed), models.create_model(name, seed)


@pytest.mark.numbers
@pytest.mark.parametrize("name", options.families())
def test_split_attention_changes_no_output(name):
    fused, split = open_clip_attention(name, 3)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = models.tokenizer(name)(["a red cat", "one object", "x", "large heart, top left"])
    with torch.no_grad():
        torch.testing.assert_close(
            split.encode_image(x), fused.encode_image(x), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            split.encode_text(tokens), fused.encode_text(tokens), atol=1e-5, rtol=1e-5
        )
    assert not any(isinstance(module, nn.MultiheadAttention) for module in split.modules())


@pytest.mark.numbers
@pytest.mark.defect
def test_attention_that_cannot_be_split_is_refused_with_the_versions_that_fit(monkeypatch):
    """As of open_clip 4, whose blocks have a class of their own."""
    model = open_clip.create_model("tiny-vit", output_dict=True)
    for block in model.visual.trunk.transformer.resblocks:
        block.attn = open_clip.transformer.Attention(block.attn.embed_dim, block.attn.num_heads)
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **options: copy.deepcopy(model))
    start = Model("tiny-vit")
    for make in (
        lambda: models.create_model("tiny-vit"),
        lambda: models.load_model(start, 0),
        lambda: models.split_attention(copy.deepcopy(model)),
        lambda: make_train_state(config.RunConfig(model=start), None, copy.deepcopy(model)),
    ):
        with pytest.raises(CmpError, match=r"model\.name: \S+attn .*open_clip_torch>=3,<4"):
            make()


NEWEST = os.environ.get("CMP_OPEN_CLIP", "")
"""What pip installs for the test below: `CMP_OPEN_CLIP=open_clip_torch` is the newest release."""
WITH_NEWEST = """
import pathlib, sys
import open_clip, torch
import cmp
from cmp import models

print(open_clip.__version__, open_clip.__file__)
try:
    for name in ("ViT-B-16", "RN50", "small", "tiny-vit"):
        names = list(models.create_on_meta(name).state_dict())
        assert any(name.endswith(".q_proj.weight") for name in names)
        assert not any("in_proj_" in name for name in names)
    model = cmp.load_model(cmp.RunConfig().model, 0).eval()
    models.export_weights(model, pathlib.Path(sys.argv[1]))
    plain = open_clip.create_model("small", pretrained=sys.argv[1]).eval()
    tokens = models.tokenizer("small")(["a red cat", "x"])
    torch.testing.assert_close(model.encode_text(tokens), plain.encode_text(tokens))
except cmp.CmpError as error:
    assert "install 'open_clip_torch" in str(error), error
    print(error)
"""


@pytest.mark.long
@pytest.mark.skipif(not NEWEST, reason="needs CMP_OPEN_CLIP, and a network")
def test_the_newest_open_clip_is_split_or_refused(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, tmp_path, NEWEST], check=True)
    path = os.pathsep.join([str(tmp_path), str(project_folder())])
    command = [sys.executable, "-c", WITH_NEWEST, tmp_path / "small.safetensors"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert str(tmp_path) in done.stdout.decode()


@pytest.mark.numbers
@pytest.mark.parametrize("count", [1, 2, 16, 33])
def test_text_in_pairs_equals_open_clips(corpus, count):
    model = models.create_model("tiny", 1)
    tokens = models.tokenizer("tiny")(corpus.texts[-count:])
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(models.encode_text(model, tokens), expected)


@pytest.mark.numbers
def test_two_threads_compute_the_same_gradients_each_time(corpus):
    """Of positions, too, whose gradients are sums over texts."""
    model = models.create_model("tiny", 1)
    tokens = models.tokenizer("tiny")(corpus.texts[:512])
    torch.set_num_threads(2)
    found = []
    for _ in range(5):
        model.zero_grad()
        models.encode_text(model, tokens).sum().backward()
        found.append(model.positional_embedding.grad.clone())
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.numbers
def test_a_text_does_not_see_its_neighbour():
    model = models.create_model("tiny", 1)
    tokens = models.tokenizer("tiny")(["a grinning cat, animal, pet", "cat"])
    other = models.tokenizer("tiny")(["a large red heart, top left", "cat"])
    with torch.no_grad():
        alike = models.encode_text(model, tokens)[1], models.encode_text(model, other)[1]
        torch.testing.assert_close(*alike)


def test_pairs_save_most_of_the_padding(corpus):
    tokens = models.tokenizer("tiny")(corpus.texts[:128])
    length = tokens.argmax(dim=1) + 1
    needed, trimmed = int(length.sum()), len(tokens) * int(length.max())
    packed = models.pack_texts(tokens)
    assert packed[0].numel() - needed < (trimmed - needed) / 2
    # a mask of every pair of tokens is made on the device
    assert sum(x.numel() for x in packed) <= 3 * packed[0].numel()


def test_other_open_clip_models_are_built_too():
    model = models.create_on_meta("RN50")
    assert model.visual.image_size == 224
    assert models.tokenizer("ViT-B-32")(["cat"]).shape == (1, 77)


def test_an_unknown_model_is_refused():
    for function in (models.create_model, models.tokenizer):  # open_clip has one for any name
        with pytest.raises(CmpError, match=r"model\.name.*tiny"):
            function("tinny")


@pytest.mark.parametrize("change", ["a bit", "the list", "no list"])
def test_a_base_that_is_not_what_was_written_is_refused(tmp_path, monkeypatch, change):
    shutil.copytree(embedded_models.WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(embedded_models, "WEIGHTS", tmp_path / "weights")
    path = embedded_models.find_base("small", "annealed", 0)
    assert path.parent == tmp_path / "weights"
    if change == "a bit":
        content = bytearray(path.read_bytes())
        content[-100] ^= 4
        path.write_bytes(content)
    elif change == "the list":
        path.with_name(DIGESTS).write_text("")
    else:
        path.with_name(DIGESTS).unlink()
    words = f"{path}: (damaged|cannot be checked).*`cmpt pretrain`"
    with pytest.raises(CmpError, match=words):
        models.load_model(Model(), 0)
    assert preflight._check_bases().state == preflight.DAMAGED
    checks = preflight.check_needs(config.parse(config.profile("quick")), "cpu")
    needs = preflight.missing_needs(checks)
    assert any(line.startswith(f"damaged: weights: {path}") for line in needs)
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 1


def test_a_missing_base_is_refused_with_the_way_to_make_it():
    with pytest.raises(CmpError, match="cmpt pretrain tiny --seed 99"):
        models.load_model(config.Model("tiny", "annealed"), 99)


@pytest.mark.parametrize("name", options.families())
def test_weights_are_a_function_of_the_seed(name):
    torch.rand(3)  # the global stream must not matter
    one, two, other = (models.create_model(name, n).state_dict() for n in (0, np.int64(0), 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_networks_may_be_created_in_threads():
    alone = [models.create_model("tiny", seed) for seed in range(4)]
    before = logging.root.manager.disable, torch.random.get_rng_state()
    with ThreadPoolExecutor(4) as threads:
        together = [*threads.map(functools.partial(models.create_model, "tiny"), range(4))]
    for one, two in zip(alone, together, strict=True):
        assert models.weights_digest(one) == models.weights_digest(two)
    assert logging.root.manager.disable == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


@pytest.mark.numbers
def test_weights_survive_the_disk(tmp_path):
    model = models.create_model("tiny", 5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    other = models.load_from_file("tiny", tmp_path / "w.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_other_peoples_weights_are_refused(tmp_path):
    save_file(models.create_model("tiny-vit").state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("vit", "text", "absent"):
        with pytest.raises(CmpError, match=f"{name}.safetensors"):
            models.load_from_file("tiny", tmp_path / f"{name}.safetensors")


def all_texts(corpus):
    """All that the models were made for: the stand-in for their pool came later."""
    prompts = [
        corpus.datasets[name].prompt.format(label)
        for name, labels in corpus.classes.items()
        for label in labels
        if corpus.datasets[name].role != "substitute"
    ]
    later = corpus.table["dataset"].isin(corpus.by_role("substitute"))
    captions = [text for row in np.flatnonzero(~later) for text in corpus.captions(row)]
    return [*dict.fromkeys(captions), *prompts]


class RecordingRanks(dict):
    """CLIP's merges and their ranks; collects those that its tokenizer performs."""

    def __init__(self, ranks):
        super().__init__(ranks)
        self.performed = set()

    def __contains__(self, merge):  # the tokenizer asks before each merge
        if super().__contains__(merge):
            self.performed.add(merge)
        return super().__contains__(merge)


def used_merges(texts):
    """The merges of CLIP's vocabulary that encoding some texts performs, in CLIP's order."""
    clip = SimpleTokenizer()
    ranks = clip.bpe_ranks = RecordingRanks(clip.bpe_ranks)
    for text in texts:
        clip.encode(text)
    return sorted(ranks.performed, key=ranks.__getitem__)


def test_the_vocabulary_is_the_corpus_own(corpus):
    lines = ["# the merges of CLIP's vocabulary that the embedded benchmark uses"]
    lines += [" ".join(merge) for merge in used_merges(all_texts(corpus))]
    content = gzip.compress("\n".join(lines).encode(), mtime=0)
    assert content == embedded_models.MERGES_FILE.read_bytes()
    size = 2 * 256 + len(lines) - 1 + 2  # bytes, also at a word's end; merges; start and end
    for name in starts.family_names():
        assert open_clip.get_model_config(name)["text_cfg"]["vocab_size"] == size
        assert models.tokenizer(name).vocab_size == size


def test_compact_pieces_are_clips_pieces(corpus):
    full, compact = SimpleTokenizer(), models.tokenizer("tiny")
    for text in all_texts(corpus):
        a = [full.decoder[token] for token in full.encode(text)]
        assert [compact.decoder[token] for token in compact.encode(text)] == a


@pytest.mark.parametrize(
    "text", ["Grüße, 世界 🙂", "antidisestablishmentarianism", "x" * 60, "\x00é"]
)
def test_any_text_stays_encodable(text):
    compact = models.tokenizer("tiny")
    assert compact.decode(compact.encode(text)).replace(" ", "") == SimpleTokenizer().decode(
        SimpleTokenizer().encode(text)
    ).replace(" ", "")


def test_captions_fit_the_context(corpus):
    """Hardly any caption is cut: what is cut cannot be learned."""
    length = models.tokenizer("tiny").context_length
    tokenizer = SimpleTokenizer()
    lengths = [len(tokenizer.encode(text)) + 2 for text in all_texts(corpus)]
    assert sum(n > length for n in lengths) / len(lengths) < 0.005


@pytest.mark.numbers
def test_features_do_not_depend_on_the_batch(corpus):
    model = models.create_model("tiny", 0).eval()
    rows = corpus.rows("test", dataset="shapes")[:40]
    features = evaluation.image_features(model, corpus, rows, "fp32")
    half = evaluation.image_features(model, corpus, rows[20:], "fp32")
    torch.testing.assert_close(features[20:], half, atol=1e-5, rtol=1e-5)


def test_tokens_take_little_memory_and_no_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    texts = tuple(map(str, range(52_000)))
    tokens = models.tokenize("tiny", texts)
    assert tokens.dtype == torch.int32 and torch.equal(tokens, models.tokenizer("tiny")([*texts]))
    assert not [*tmp_path.iterdir()]
    models.tokenize.cache_clear()


def test_what_is_frozen_stays_frozen_when_attention_is_split():
    network = models.create_fused_model("tiny-vit")
    network.visual.requires_grad_(False)
    assert not all(x.requires_grad for x in network.parameters())
    split = models.split_attention(network)
    assert not any(x.requires_grad for x in split.visual.parameters())
