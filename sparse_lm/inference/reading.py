"""Bytes that decoding one token reads: of a packed model's weights, and of its cache."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from sparse_lm.core import tree
from sparse_lm.core.format import is_packed
from sparse_lm.core.paths import KERNEL, Place
from sparse_lm.inference.pack import PackedModel
from sparse_lm.layers.sow import gate_activity
from sparse_lm.model import plans
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost
from sparse_lm.plan.cost import Gate
from sparse_lm.plan.plan import ModelPlan


class ReadBytes(NamedTuple):
  """Bytes that decoding one token reads.

  Attributes:
    weights: bytes of weights, for a batch of one sequence; sequences of a batch share these reads.
    cache: bytes of keys, values and other cached arrays of the token's sequence. A program reads the
      whole cache, even if it holds few tokens.
  """

  weights: int
  cache: int


def read_bytes(packed: PackedModel, tokens_BxL: np.ndarray) -> ReadBytes:
  """Returns the bytes that decoding one token reads, with the gates' mean activity on a text.

  Args:
    packed: the packed model.
    tokens_BxL: int32 tokens of the text.
  """
  model, plan = packed.model, plan_of(packed.model)
  run = jax.jit(lambda v, t: model.apply(v, t, mode='eval', mutable=['gates'])[1])
  active = gate_activity(run(packed.variables, tokens_BxL))
  weights = _weights(packed, plan, tokens_BxL.shape[1], active)
  reads = {
    path: dataclasses.replace(read, gates=tuple(gate for gate in read.gates if gate.skips))
    for path, read in plans.reads(model, packed.variables).items()
  }
  cached = cost.read_bytes(reads, cost.open_fractions(reads, active))
  return ReadBytes(weights, round(float(cached)))


def _weights(
  packed: PackedModel, plan: ModelPlan, length: int, active: Mapping[str, jax.Array]
) -> int:
  read = cost.read_shares(
    plans.ledger(packed.model, length),
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
  """Returns whether all down-projections after a gate's units read only the selected units.

  The gate selects units if it is the module that declares them or that module's activation. For other
  gates there is no such matrix, and the result is true.
  """
  selected = [
    group
    for group in plan.units
    if group.dynamic and Place.parse(gate.path).within(Place.parse(group.path))
  ]
  behind = [m.path for group in selected for m in group.members if m.axis == -2]
  return all(packed.matrices[p].runs.selects == -2 for p in behind if p in packed.matrices)
