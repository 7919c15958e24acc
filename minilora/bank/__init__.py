"""Many adapters on one model: `Bank`, and the room that it works in.

bank.py         what one does with it: rows, load, add, replace, remove, parameters, save
rows.py         which adapter each row of a batch has
directory.py    which adapter has which slot
stack.py        a tensor for each slot, and what trains of it
gathered.py     the maths: each row with the factors of its own adapter
site.py         what the wrappers of a bank have in common
linear.py, embedding.py, head.py    the wrappers
filling.py      from a file, or a config, to what goes into a slot
blueprint.py    a bank beside its model, checked, and not in it yet
combining.py    a weighted sum of adapters is an adapter
"""

from .bank import Bank
from .combining import Combination, combine

__all__ = ["Bank", "Combination", "combine"]
