"""How many bytes of its weights a packed model reads for each token."""

import math

import jax
import numpy as np

from sparse_lm.core import tree
from sparse_lm.core.format import is_packed
from sparse_lm.core.paths import KERNEL, Place
from sparse_lm.inference.pack import PackedModel
from sparse_lm.layers.sow import activity_of
from sparse_lm.model import plans
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost
from sparse_lm.plan.cost import Gate
from sparse_lm.plan.plan import ModelPlan


def read_bytes(packed: PackedModel, tokens_BxL: np.ndarray) -> int:
  """Bytes of weights that a token of a batch of one reads, gates as they are on the text.

  Args:
    packed: the model.
    tokens_BxL: int32, the text.
  """
  model, plan = packed.model, plan_of(packed.model)
  run = jax.jit(lambda v, t: model.apply(v, t, mode='eval', mutable=['gates'])[1])
  active = activity_of(run(packed.variables, tokens_BxL))
  read = cost.read_shares(
    plans.ledger(model, tokens_BxL.shape[1]),
    {path: math.prod(leaf.shape) for path, leaf in plan.shapes.items()},
    active,
    lambda gate: gate.skips and _gathers(gate, packed, plan),
  )
  for layer, parts in plan.fused.items():
    one, first = (str(Place.parse(path) / KERNEL) for path in (layer, parts[0]))
    read[one] = read[first]  # all parts run under the same gates
  nbytes = {
    tree.path_name(path): leaf.nbytes
    for path, leaf in jax.tree_util.tree_leaves_with_path(packed.variables, is_leaf=is_packed)
  }
  stored = {p: nbytes.get(f'packed/{p}', nbytes.get(f'params/{p}', 0)) for p in read}
  return round(sum(stored[path] * share for path, share in read.items()))


def _gathers(gate: Gate, packed: PackedModel, plan: ModelPlan) -> bool:
  """Whether all matrices behind the units that a gate selects are read for the selected units alone.

  The gate selects units where it is the module that has them, or that module's activation. Of any other
  gate, this is true: there is no such matrix.
  """
  selected = [
    group
    for group in plan.units
    if group.dynamic and Place.parse(gate.path).within(Place.parse(group.path))
  ]
  behind = [m.path for group in selected for m in group.members if m.axis == -2]
  return all(packed.matrices[p].runs.selects == -2 for p in behind if p in packed.matrices)
