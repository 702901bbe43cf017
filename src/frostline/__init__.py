"""What does it cost to train part of a network? Exactly, and before it runs.

>>> import torch, frostline as fl
>>> model = torch.nn.Linear(16, 4)
>>> trace = fl.trace(model, torch.randn(8, 16), loss=lambda y: y.sum())
>>> trace.cost(train="weight").saved_bytes  # the input: 8 * 16 * 4 bytes
512
>>> trace.cost(train="bias").saved_bytes
0
"""

from frostline.costing.comparison import Comparison, compare
from frostline.costing.cost import Cost
from frostline.costing.formulas import register_flops
from frostline.errors import FrostlineError
from frostline.fitting.fit import fit
from frostline.fitting.result import Fit
from frostline.measuring.measure import measure
from frostline.measuring.measurement import Measurement
from frostline.planning.frontier import Frontier, frontier
from frostline.planning.importance import Importance, importance
from frostline.planning.plan import plan
from frostline.planning.result import Plan
from frostline.running.train_only import Run, train_only
from frostline.subsets import Subset
from frostline.tracing.trace import Trace, trace
from frostline.watching.watch import Watch, watch

__version__ = "0.1.0"
__all__ = [
    "Comparison", "Cost", "Fit", "Frontier", "FrostlineError", "Importance", "Measurement", "Plan", "Run", "Subset",
    "Trace", "Watch", "compare", "fit", "frontier", "importance", "measure", "plan", "register_flops", "trace",
    "train_only", "watch",
]  # fmt: skip
