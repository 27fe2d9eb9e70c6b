"""Models in the formats of `transformers` and ONNX, and models of a hub as others name them.

What needs an extra is skipped where it is missing, unless REQUIRE_EXTRAS=1 says that it must not
be; the rest runs everywhere.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from pictures import classes, fileset, picture, tree, write_manifest
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from typer.testing import CliRunner

from cmp import cli, models, registry, starts
from cmp.config import Model
from cmp.errors import CmpError
from cmp.methods import galore
from cmp.releases import exports, hugging_face, onnx_files, update, update_plan
from cmp.runs import store

CLIP_VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16}
CLIP_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP = {"embed_dim": 24, "vision_cfg": CLIP_VISION, "text_cfg": CLIP_TEXT}
WORDED = CLIP | {"text_cfg": {
    "context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2,
    "hf_tokenizer_name": "someone/words", "tokenizer_kwargs": {"clean": "canonicalize"},
}}  # fmt: skip
SIGMOID = CLIP | {"init_logit_bias": -10.0, "custom_text": True}
"""A network for SigLIP's loss."""
SQUASHED = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
WORDS = "a cat photo of two dogs running the shops 3 red shoes size 42 an octopus very long"


def need(package):
    """Return a package of an extra; skip the test where it is missing and may be."""
    if os.environ.get("REQUIRE_EXTRAS") == "1":
        return importlib.import_module(package)
    return pytest.importorskip(package)


def make_folder(folder, config, preprocess=None, seed=0):
    """A model's folder as open_clip writes it, with random weights in which nothing is zero or one,
    so that no tensor can be forgotten unseen. Returns the model's name."""
    folder.mkdir()
    about = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    name = f"local-dir:{folder}"
    weights = models.create_fused_model(name, seed).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for x in filter(torch.is_floating_point, weights.values()):
        x += 0.1 * torch.randn(x.shape, generator=generator)
    save_file(weights, folder / "open_clip_model.safetensors")
    return name


def add_tokenizer(folder):
    """Give a folder a tokenizer of a few words, without capitals and punctuation."""
    tokenizers, transformers = need("tokenizers"), need("transformers")
    vocabulary = {
        word: i for i, word in enumerate(["<unk>", "</s>", *dict.fromkeys(WORDS.split())])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = {"single": "$A </s>", "special_tokens": [("</s>", 1)]}
    backend.post_processor = tokenizers.processors.TemplateProcessing(**ends)
    names = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def load(name):
    return models.load_model(Model(name, "hub"), 0).eval()


def invoke(*words):
    """What `cmpt` prints; its error is raised."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if result.exception:
        raise result.exception
    return result.output


def picture_of(seed, size=(50, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def features_by_transformers(folder, texts):
    """Unit features of a picture and of texts by what a reader would write, with the logits."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=texts, images=picture_of(1), padding="max_length", truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        output = model(**inputs)
    image, text = (F.normalize(x, dim=-1) for x in (output.image_embeds, output.text_embeds))
    return inputs["pixel_values"], image, text, output.logits_per_image


@pytest.mark.parametrize("quick", [False, True])
def test_clip_loads_in_transformers(tmp_path, quick):
    """The towers, the logits, the preprocessing and the tokens are those of open_clip alone."""
    transformers = need("transformers")
    name = make_folder(tmp_path / "clip", {**CLIP, "quick_gelu": quick})
    out = tmp_path / "out"
    said = invoke("export", name, "--to", "transformers", "-o", out)
    assert 'CLIPModel.from_pretrained("' in said and "checked: features differ" in said
    assert "no tokenizer" not in said
    config = json.loads((out / "config.json").read_text())
    acts = {config[f"{tower}_config"]["hidden_act"] for tower in ("text", "vision")}
    assert acts == ({"quick_gelu"} if quick else {"gelu"})
    theirs, _, prepare = open_clip.create_model_and_transforms(name)
    texts = ["A photo of two Dogs, running!", "Straße in München, 1987", "a very long " * 20]
    pixels, image, text, logits = features_by_transformers(out, texts)
    expected_pixels = prepare(picture_of(1))[None]
    assert (pixels - expected_pixels).abs().max() < 1.01 / 255 / 0.26  # one level: torchvision's
    own = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    found = own(images=picture_of(1), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected_pixels, atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = theirs.eval().encode_image(pixels, normalize=True)
        tokens = open_clip.get_tokenizer(name)(texts)
        expected_text = theirs.encode_text(tokens, normalize=True)
        scale = theirs.logit_scale.exp()
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, expected_text, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, scale * expected @ expected_text.T, atol=1e-3, rtol=0)


def test_a_tokenizer_of_another_kind_is_named_instead_of_written(tmp_path):
    need("transformers")
    name = make_folder(tmp_path / "words", WORDED)
    add_tokenizer(tmp_path / "words")
    probe = exports.make_probe(name, load(name))
    [note] = hugging_face.write_tokenizer(name, models.tokenizer(name), probe, tmp_path / "words")
    assert note.startswith("no tokenizer is written (it is a HFTokenizer): use someone/words, ")


def test_a_model_whose_tokenizer_is_not_here_is_not_exported(tmp_path):
    need("transformers")
    name = make_folder(tmp_path / "words", WORDED)
    with pytest.raises(CmpError, match="its tokenizer cannot be read"):
        invoke("export", name, "--to", "transformers", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def swap(tensors):
    """Exchange two tensors of one shape."""
    first, second = (f"vision_model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qv")
    tensors[first], tensors[second] = tensors[second], tensors[first]
    return tensors


def test_an_export_with_other_features_leaves_nothing(tmp_path, monkeypatch):
    need("transformers")
    name, out = make_folder(tmp_path / "clip", CLIP), tmp_path / "out"
    rename = hugging_face.rename_tensors
    monkeypatch.setattr(hugging_face, "rename_tensors", lambda *given: swap(rename(*given)))
    with pytest.raises(CmpError, match=r"out: features differ .* nothing was written"):
        invoke("export", name, "--to", "transformers", "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    monkeypatch.undo()
    invoke("export", name, "--to", "transformers", "-o", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(hugging_face, "rename_tensors", lambda *given: swap(rename(*given)))
    with pytest.raises(CmpError, match="nothing was written"):
        invoke("export", name, "--to", "transformers", "-o", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_features_that_differ_are_refused(wrong):
    """A picture's, a text's, or a number that is none."""
    features = F.normalize(torch.randn(8, 4), dim=-1)
    probe = exports.Probe(torch.zeros(8, 3, 2, 2), torch.zeros(8, 2), features, features)
    image, text = features.clone(), features.clone()
    assert exports.compare_features(probe, image, text, "x") == (0, 0)
    (image, text, image)[wrong][3, 1] += (2e-5, -2e-5, torch.nan)[wrong]
    with pytest.raises(CmpError, match="x: features differ"):
        exports.compare_features(probe, image, text, "x")


def test_every_tensor_has_a_name_of_its_own(tmp_path):
    """Without `transformers`: nothing is lost, nothing is written twice."""
    model = load(make_folder(tmp_path / "clip", CLIP))
    renamed = hugging_face.rename_tensors("x", model)
    own = sum(x.numel() for x in model.state_dict().values())
    assert sum(x.numel() for x in renamed.values()) == own
    assert hugging_face.rename("visual.trunk.cls_token") is None
    assert hugging_face.rename("transformer.resblocks.0.ls_1.gamma") is None


REFUSED = {
    "a conv tower": ("small", "its image tower is a ConvTower"),
    "a stem": ("tiny-vit", "its image tower is a StemTransformer"),
    "a ResNet": (
        {**CLIP, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}},
        "its image tower is a ModifiedResNet",
    ),
    "layer scale": (
        {**CLIP, "vision_cfg": {**CLIP_VISION, "ls_init_value": 0.1}}, "ls_1.* has no counterpart",
    ),
    "a bias of the logits": (SIGMOID, "logit_bias"),
    "a tower of timm": (
        {**CLIP, "vision_cfg": {"image_size": 32, "timm_model_name": "vit_tiny_patch16_224"}},
        "its image tower is a VisionTransformer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_does_not_have_is_refused_by_name(tmp_path, case):
    what, words = REFUSED[case]
    name = what if isinstance(what, str) else make_folder(tmp_path / "x", what)
    model = models.create_model(name)
    with pytest.raises(CmpError, match=f"--to transformers: .*{words}.*--to onnx"):
        hugging_face.export_transformers(name, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"vision_cfg": {**CLIP_VISION, "pool_type": "avg"}},
        {"text_cfg": {**CLIP_TEXT, "pool_type": "last"}},
    ],
)
def test_a_network_that_pools_otherwise_is_refused(tmp_path, other):
    """Its tensors have all the right names."""
    need("transformers")
    name = make_folder(tmp_path / "x", {**CLIP, **other})
    with pytest.raises(CmpError, match=r"features differ from the network's .*nothing was written"):
        hugging_face.export_transformers(name, models.create_model(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_filled_up_are_refused(tmp_path):
    name = make_folder(tmp_path / "x", CLIP, {"resize_mode": "longest"})
    with pytest.raises(CmpError, match="resize_mode 'longest'"):
        invoke("export", name, "--to", "transformers", "-o", tmp_path / "out")


@pytest.mark.parametrize("package, to", [("transformers", "transformers"), ("onnxruntime", "onnx")])
def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch, package, to):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=package) as caught:
        invoke("export", make_folder(tmp_path / "x", CLIP), "--to", to, "-o", tmp_path / "out")
    assert caught.value.name == package
    assert not (tmp_path / "out").exists()
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert f'"{package}>=' in extras.partition(f"\n{to} = ")[2].partition("\n")[0]


@pytest.mark.long
@pytest.mark.parametrize("what", ["clip", "sigmoid", "small", "tiny-vit", "resnet"])
def test_any_network_runs_in_onnxruntime(tmp_path, what):
    """From what the page of facts says alone: batches of any size, features, logits."""
    onnx, runtime, _ = map(need, ("onnx", "onnxruntime", "onnxscript"))
    out = tmp_path / "out"
    if what in starts.family_names():
        model, name = models.create_model(what).eval(), what
        onnx_files.export_onnx(name, model, out)
    else:
        networks = {"clip": CLIP, "sigmoid": SIGMOID, "resnet": REFUSED["a ResNet"][0]}
        name = make_folder(tmp_path / what, networks[what], SQUASHED)
        said = invoke("export", name, "--to", "onnx", "-o", out)
        assert "checked: features differ" in said and "opset 18" in said
        model = load(name)
    facts = json.loads((out / "export.json").read_text())
    for tower in ("image", "text"):
        file = onnx.load(out / facts[tower]["file"])
        assert [x.version for x in file.opset_import] == [facts["opset"]]
    generator = torch.Generator().manual_seed(5)
    for batch in (1, 5):
        pixels = torch.randn(batch, *facts["image"]["shape"][1:], generator=generator)
        size = (batch, facts["text"]["shape"][1])
        tokens = torch.randint(60, size, generator=generator)
        found = [
            runtime.InferenceSession(out / facts[tower]["file"]).run(None, {key: x.numpy()})[0]
            for tower, key, x in (("image", "pixels", pixels), ("text", "tokens", tokens))
        ]
        with torch.no_grad():
            expected = models.encode_image(model, pixels), models.encode_text(model, tokens)
            logits = model.get_logits(pixels, tokens)[0]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(x), y, atol=1e-5, rtol=0)
        ours = facts["logit_scale"] * found[0] @ found[1].T + facts["logit_bias"]
        torch.testing.assert_close(torch.from_numpy(ours), logits, atol=1e-3, rtol=0)


@pytest.mark.long
def test_weights_of_two_gigabytes_go_into_a_file_of_their_own(tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        need(package)
    monkeypatch.setattr(onnx_files, "MAX_INLINE_BYTES", 1000)
    name, out = make_folder(tmp_path / "clip", CLIP), tmp_path / "out"
    onnx_files.export_onnx(name, load(name), out)
    names = {path.name for path in out.iterdir()}
    assert names == {"export.json", "image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"}


def test_a_hub_s_model_is_exported_as_a_file_of_open_clip(tmp_path, monkeypatch):
    name, out = make_folder(tmp_path / "clip", CLIP), tmp_path / "out.safetensors"
    invoke("export", name, "-o", out)
    before = out.read_bytes()
    invoke("export", tmp_path / "clip", "-o", out)
    assert out.read_bytes() == before
    theirs = load_file(tmp_path / "clip" / "open_clip_model.safetensors")
    ours = load_file(out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    folder, again = tmp_path / "saved", tmp_path / "mine.safetensors"
    save_file(ours, again)  # as other programs save it again
    tree(folder, {"open_clip_model.safetensors": b"mine"})
    with monkeypatch.context() as patch:  # what cannot be written is not loaded first
        patch.setattr(models, "load_model", lambda *_: pytest.fail("the network was loaded"))
        with pytest.raises(CmpError, match=r"--to hf: .*give the id of a run"):
            invoke("export", name, "--to", "hf", "-o", tmp_path / "hub")
        with pytest.raises(CmpError, match=r"a name that ends in \.safetensors"):
            invoke("export", name, "-o", tmp_path / "out")
        with pytest.raises(CmpError, match=r"mine\.safetensors: has changed since `cmpt export`"):
            invoke("export", name, "-o", again)
        for to in ("transformers", "onnx"):
            with pytest.raises(CmpError, match=r"'open_clip_model\.safetensors' .* is not from"):
                invoke("export", name, "--to", to, "-o", folder)
        with pytest.raises(CmpError, match=r"'model\.safetensors' has changed since"):
            (folder / "open_clip_model.safetensors").rename(folder / "model.safetensors")
            invoke("export", name, "--to", "transformers", "-o", folder)
    with pytest.raises(CmpError, match=r"open_clip_model\.safetensors"):
        (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
        invoke("export", name, "-o", out)


def test_a_hub_s_model_is_scored_with_its_own_weights(tmp_path):
    """`cmpt eval` asks for no start, which for such a model could be one only."""
    name = make_folder(tmp_path / "clip", CLIP)
    for species, seed in {"oak": 1, "red fox": 2}.items():
        files = {f"{n}.png": picture(10 * seed + n, (40, 30)) for n in range(8)}
        tree(tmp_path / "data" / "eval" / species, files)
    dataset = fileset(name="eval", role="eval", reader={"path": "eval"})
    (tmp_path / "data" / "eval.yaml").write_text(dataset.model_dump_json(exclude_none=True))
    common = ("eval", name, "--data", tmp_path / "data", "--device", "cpu")
    said = [invoke(*common, *given) for given in ((), ("--start", "hub"))]
    assert said[0] == said[1] and "A_ZS" in said[0]


@pytest.mark.usefixtures("build")
def test_a_model_takes_its_tokenizer_along(tmp_path):
    """A release and a folder for the hub need nothing of the folder that the model came from."""
    name = make_folder(tmp_path / "words", WORDED)
    add_tokenizer(tmp_path / "words")
    data = classes(tmp_path / "month", names=("red shoes", "octopus"), each=16)
    write_manifest(data / "manifest.yaml")
    one_step = ["training.batch=8", "evaluation.subset=4", "mixture.pretraining=0"]
    one_step += ["mixture.update=0.5", "mixture.buffer=0.5", "training.passes=null"]
    plan = update_plan.plan_update(name, data, [*one_step, "training.task_steps=[1]"])
    made, hub = update.compute_update(plan, tmp_path / "release"), tmp_path / "hub"
    given = *one_step, f"model.name={name}", "model.start=hub", "stream.tasks=1", f"data={data}"
    invoke("run", "quick", *given, "training.steps=1", "--keep-weights", "--device", "cpu")
    [run] = store.stored_ids()
    for _ in range(2):  # its own files are replaced
        invoke("export", run, "--to", "hf", "-o", hub)
    texts = ["a cat", "A photo of two Dogs, running!"]
    expected = open_clip.get_tokenizer(name)(texts)
    shutil.rmtree(tmp_path / "words")
    for folder in (made.folder, hub):
        assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), expected)
        invoke("eval", f"local-dir:{folder}", "--data", data, "--device", "cpu")
    assert "A_KA" in invoke("compare", made.folder, hub, "--data", data, "--device", "cpu")
    (made.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CmpError, match=r"tokenizer\.json: damaged"):
        invoke("compare", made.folder, hub, "--data", data, "--device", "cpu")
    (hub / "tokenizer.json").unlink()
    with pytest.raises(CmpError, match=r"hub: its tokenizer cannot be read .*save_pretrained"):
        models.tokenizer.__wrapped__(f"local-dir:{hub}")


def test_an_embedded_model_in_a_folder_keeps_its_tokens(tmp_path):
    """open_clip would take CLIP's vocabulary, whose tokens the model does not know."""
    name = make_folder(tmp_path / "small", open_clip.get_model_config("small"))
    texts = ["a red cat", "one object"]
    assert starts.known_name(name) == "small"
    assert torch.equal(models.tokenizer(name)(texts), models.tokenizer("small")(texts))
    other = make_folder(tmp_path / "clip", CLIP)
    assert starts.known_name(other) == other


@pytest.mark.long
def test_a_budget_leaves_out_what_a_network_does_not_take(tmp_path, monkeypatch):
    """SigLIP's loss has no labels to draw, which the exact Fisher matrix needs; asked for by name,
    the method is refused."""
    monkeypatch.setattr(registry, "option_names", lambda kind: ["full", "ewc", "galore"])
    name = make_folder(tmp_path / "sigmoid", SIGMOID)
    said = invoke("budget", "--model", name)
    assert "left out: ewc: method.fisher" in said
    assert "\n full " in said and "\n galore " in said and "\n ewc " not in said
    with pytest.raises(CmpError, match=r"method\.fisher"):
        invoke("budget", "--model", name, "--method", "ewc")
    assert "left out" not in invoke("budget", "--model", make_folder(tmp_path / "clip", CLIP))


@pytest.mark.numbers
def test_galore_projects_no_matrix_of_one_row():
    """Such as the positions of timm's towers, [1, N, W], whose step is AdamW's own."""
    value, gradient = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    trained = []
    for make in (torch.optim.AdamW, galore.ProjectedAdamW):
        parameter = torch.nn.Parameter(value.clone())
        own = {} if make is torch.optim.AdamW else {"rank": 8, "gap": 2, "scale": 2.0}
        options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        optimizer = make([parameter], **own, **options)
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        trained.append(parameter.detach())
    torch.testing.assert_close(*trained, atol=1e-6, rtol=1e-5)
