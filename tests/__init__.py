"""Tests, and programs beside them that run as `python -m tests.golden`.

Modules here import each other by their bare names, as pytest's `pythonpath` allows.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
