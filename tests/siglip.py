"""A small image tower of SigLIP's kind, as timm builds it for open_clip."""

import timm

SIGLIP_VISION = {
    "image_size": 32, "timm_model_name": "cmp_test_siglip", "timm_model_pretrained": False,
    "timm_pool": "map", "timm_proj": "none",
}  # fmt: skip


@timm.models.register_model
def cmp_test_siglip(pretrained=False, **options):
    """A small tower of SigLIP's kind; `pretrained` is timm's."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    options = {key: options[key] for key in ("num_classes", "global_pool") if key in options}
    return timm.models.VisionTransformer(**shape, class_token=False, **options)
