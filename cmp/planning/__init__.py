"""The planner: from what one has, and what must be kept, to a run that is ready to start.

`wishes` says what can be asked and refuses what cannot be; `devices` and `costs` forecast what a
run costs; `evidence` holds what the published studies found; `choosing` makes the plan of them;
`telling` puts it in words and in YAML.
"""

from cmp.planning.choosing import Plan, plan
from cmp.planning.devices import DEVICES
from cmp.planning.evidence import Evidence, gather
from cmp.planning.wishes import KEEP, NEW, Impossible, Wish

__all__ = ["DEVICES", "KEEP", "NEW", "Evidence", "Impossible", "Plan", "Wish", "gather", "plan"]
