"""Which parameters train: patterns, slices, modules, optimizers and predicates become a :class:`Subset`.

>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
>>> resolve("2", model).names
('2.weight', '2.bias')
>>> resolve("@all, !*.bias", model).names
('0.weight', '2.weight')
>>> subset = resolve("0.weight[:, 8:]", model)
>>> subset.spelled(), subset.num_parameters()
(('0.weight[:, 8:]',), 256)
"""

from frostline.subsets.built_ins import BUILT_INS
from frostline.subsets.resolver import resolve
from frostline.subsets.slices import TensorSlice
from frostline.subsets.stacks import blocks, num_blocks
from frostline.subsets.subset import Subset

__all__ = ["BUILT_INS", "Subset", "TensorSlice", "blocks", "num_blocks", "resolve"]
