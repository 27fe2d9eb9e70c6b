"""Full fine-tuning: everything trains, nothing is added."""

from cmp.methods import layers
from cmp.registry import register
from cmp.training import UpdateMethod

register("method", "full", ["layer_decay", "image_rate"])(UpdateMethod(rates=layers.rate_multiples))
