"""Full fine-tuning: everything trains, nothing is added."""

from cmp.registry import register
from cmp.training import UpdateMethod

register("method", "full")(UpdateMethod())
