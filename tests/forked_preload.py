"""What the fork server does once for all its children: imports, the small corpus, the caches."""

import forked
import pyarrow.parquet
import torch

from cmp import evaluation, models

torch.set_num_threads(1)
assert pyarrow.parquet  # imported by pandas at the first run that is stored
evaluation.evaluate(models.create_model("tiny"), "tiny", forked.small_corpus())
