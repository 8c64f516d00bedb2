"""Packs a sparse model, so that inference reads and multiplies only its kept weights."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from sparse_lm.core import tree
from sparse_lm.core.format import Format, is_packed
from sparse_lm.core.groups import Group
from sparse_lm.core.paths import BIAS, KERNEL, Part, Place
from sparse_lm.core.tree import Tree
from sparse_lm.inference import costs, formats
from sparse_lm.inference.shrink import Shrunk, shrink
from sparse_lm.model import lm
from sparse_lm.model.lm import LM
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost
from sparse_lm.plan.plan import ModelPlan


@dataclasses.dataclass(frozen=True, repr=False)
class Matrix:
  """One packed kernel.

  Attributes:
    path: path of the parameter.
    runs: the kernel in the format that multiplies.
    stored: the kernel in the format for the disk.
    dense_bytes: bytes of the kernel before packing.
    why: if the kernel runs dense although it is sparse, why other formats were not chosen.
  """

  path: str
  runs: Format
  stored: Format
  dense_bytes: int
  why: str = ''

  def __repr__(self) -> str:
    runs, stored = formats.name_of(self.runs), formats.name_of(self.stored)
    return f'Matrix({self.path!r}, runs {runs}, stored {stored})'


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel to pack, after the removal of units.

  Attributes:
    weights: `[..., in, out]`.
    mask: bool, of the same shape.
    dense_bytes: bytes of the kernel before the removal.
  """

  weights: np.ndarray
  mask: np.ndarray
  dense_bytes: int

  @classmethod
  def fused(cls, kernels: Sequence['Kernel']) -> 'Kernel':
    """Concatenates the outputs of several kernels with the same inputs."""
    weights = np.concatenate([kernel.weights for kernel in kernels], axis=-1)
    mask = np.concatenate([kernel.mask for kernel in kernels], axis=-1)
    return cls(weights, mask, sum(kernel.dense_bytes for kernel in kernels))


@dataclasses.dataclass(frozen=True, repr=False)
class PackedModel:
  """A model with packed kernels.

  Attributes:
    model: the model.
    variables: `packed`, `params` for parameters that are not packed, and the model's other collections.
    matrices: the packed kernels by path.
    removed: one line of text for each group that lost units.
  """

  model: LM
  variables: Tree
  matrices: dict[str, Matrix]
  removed: list[str]

  def __repr__(self) -> str:
    return f'PackedModel({len(self.matrices)} matrices, {len(self.removed)} units removed)'


def pack(model: LM, params: Tree, masks: Tree, state: Tree) -> PackedModel:
  """Removes units that are dropped as a whole, and packs every kernel in the format predicted fastest.

  Kernels and biases are stored in `spec.precision`, the dtype of the model's computation.

  Args:
    model: the model.
    params: its parameters, with zeros for dropped weights.
    masks: a tree like `params`; `None` for dense parameters.
    state: the model's other collections.
  """
  original = {path: np.asarray(leaf) for path, leaf in tree.named(params).items()}
  plan = plan_of(model)
  original |= {path: original[path].astype(model.spec.compute) for path in plan.packable}
  dropped = {path: np.asarray(mask) for path, mask in tree.named(masks).items()}
  left = shrink(original, dropped, plan.units, _closed(model, params, state))
  packable = {path: left.params.pop(path) for path in plan.packable if path in left.params}
  small = {path: array for path, array in packable.items() if not _is_kernel(path, array.shape)}
  kernels = {
    path: Kernel(array, left.masks.get(path, np.ones(array.shape, bool)), original[path].nbytes)
    for path, array in packable.items()
    if path not in small
  }
  sizes = {path: math.prod(leaf.shape) for path, leaf in plan.shapes.items()}
  gated = _with_gated_inputs(plan)
  matrices = _chosen(plan.units, kernels, cost.read_shares(plan.ledger, sizes), gated)
  for path, parts in plan.fused.items():
    one, *each = (str(Place.parse(layer) / KERNEL) for layer in (path, *parts))
    if gated.intersection(each):  # each has its own nonzero inputs
      continue
    matrices = _fused(one, each, kernels, matrices)
    bias, *biases = (str(Place.parse(layer) / BIAS) for layer in (path, *parts))
    if one in matrices and any(part in small for part in biases):
      widths = [kernels[kernel].weights.shape[-1] for kernel in each]
      zeros = [np.zeros(width, model.spec.compute) for width in widths]
      small[bias] = np.concatenate([small.pop(*pair) for pair in zip(biases, zeros)])
  return assemble(model, left, matrices, small, state)


def _with_gated_inputs(plan: ModelPlan) -> set[str]:
  """Returns the kernels of linear layers that are charged for the nonzero ones of their inputs."""
  linear = [m for m in plan.ledger.values() if m.kernel is not None]
  layer_of = lambda m: str(Place.parse(m.kernel).module)  # noqa: E731
  return {m.kernel for m in linear if any(gate.path == layer_of(m) for gate in m.gates)}


def _is_kernel(path: str, shape: tuple[int, ...]) -> bool:
  """Returns whether a packable parameter is a matrix or stacked matrices, and not (stacked) biases."""
  return len(shape) >= 2 and not Place.parse(path).is_bias


def _chosen(
  groups: Iterable[Group],
  kernels: dict[str, Kernel],
  fractions: dict[str, float],
  gated: set[str],
) -> dict[str, Matrix]:
  """Chooses the format of each kernel.

  If a method selects hidden units, down-projections are chosen first: the up-projection can compute only
  the selected outputs if the down-projection's format can read only the selected inputs.
  """
  chosen = {
    path: choose(path, kernels[path], {-2: fractions[path]}) for path in kernels if path in gated
  }
  for group in groups:
    if group.kind == 'neuron' and group.dynamic:
      members = [m for m in group.members if m.path in kernels and m.path not in gated]
      down, up = ([m.path for m in members if m.axis == axis] for axis in (-2, -1))
      chosen |= {path: choose(path, kernels[path], {-2: fractions[path]}) for path in down}
      gathers = all(chosen[path].runs.selects == -2 for path in down)
      chosen |= {
        path: choose(path, kernels[path], {-1: fractions[path]} if gathers else {}) for path in up
      }
  chosen |= {path: choose(path, k, {}) for path, k in kernels.items() if path not in chosen}
  return {path: chosen[path] for path in kernels}


def _fused(
  path: str, parts: list[str], kernels: dict[str, Kernel], matrices: dict[str, Matrix]
) -> dict[str, Matrix]:
  """Replaces several matrices by one fused matrix if it is predicted to be no slower.

  The fused matrix may be somewhat larger on disk, if the parts' masks suit better formats.
  """
  if not all(part in kernels for part in parts):
    return matrices
  one = choose(path, Kernel.fused([kernels[part] for part in parts]), {})
  predicted = costs.current().predicted
  if predicted(one.runs) > sum(predicted(matrices[part].runs) for part in parts):
    return matrices
  first, *others = parts
  kept = [one if p == first else matrix for p, matrix in matrices.items() if p not in others]
  return {matrix.path: matrix for matrix in kept}


def dense_twin(model: LM, seed: int = 0) -> PackedModel:
  """Returns the packed dense twin with random weights, with which a packed model's speed is compared."""
  model = lm.dense_twin(model)
  draw = np.random.default_rng(seed)
  shapes = plan_of(model).params
  params = jax.tree.map(
    lambda a: (0.02 * draw.standard_normal(a.shape, np.float32)).astype(a.dtype), shapes
  )
  return pack(model, params, jax.tree.map(lambda _: None, shapes), {})


def assemble(
  model: LM, left: Shrunk, matrices: dict[str, Matrix], small: dict[str, np.ndarray], state: Tree
) -> PackedModel:
  """Assembles a packed model from its parts."""
  stored: dict[str, Tree] = {path: matrix.runs for path, matrix in matrices.items()} | small
  stored |= {f'{path}/kept': kept for path, kept in left.kept.items()}
  stored |= {Part.REMOVED.of(layer): np.zeros((), np.int32) for layer in left.removed_layers}
  variables = {'params': nested(left.params), 'packed': nested(stored), **state}
  return PackedModel(model, jax.device_put(variables), matrices, left.removed)


def nested(flat: Mapping[str, Tree]) -> Tree:
  """Converts paths to nested dicts: `{'a/b': x}` becomes `{'a': {'b': x}}`."""
  out: Tree = {}
  for path, value in flat.items():
    *parents, last = Place.parse(path).names
    node = out
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = value
  return out


def choose(path: str, kernel: Kernel, read: dict[int, float]) -> Matrix:
  """Chooses the formats of a kernel: the fastest one to run, by prediction, and the smallest on disk.

  Args:
    path: path of the parameter.
    kernel: the kernel.
    read: fraction of the inputs (-2) or outputs (-1) that a method selects, by axis.
  """
  refusals, runs, stored = [], [], []
  for name in formats.names():
    cls = formats.load(name)
    if cls.selects == -2 and -2 not in read:
      continue
    if why := cls.refuses(kernel.mask):
      if not cls.plain:
        refusals.append(f'{name}: {why}')
      continue
    candidate = cls.pack(kernel.weights, kernel.mask)
    predicted = costs.current().predicted(candidate, read.get(cls.selects, 1.0))
    (runs if cls.runs else stored).append((predicted, candidate))
    if cls.runs and not cls.plain:
      refusals.append(f'{name}: as slow as {predicted / 1e6:.2f} MB of dense weights')
  best = min(runs, key=lambda pair: pair[0])[1]
  smallest = min([best, *(c for _, c in reversed(stored))], key=lambda c: c.nbytes)
  why = '; '.join(refusals) if best.plain and not kernel.mask.all() else ''
  return Matrix(path, best, smallest, kernel.dense_bytes, why)


def _closed(model: LM, params: Tree, state: Tree) -> list[int]:
  """Returns the layers whose gate is closed for every input."""
  depth = next(slot for slot in model.slots if slot.slot == 'depth')
  layers = range(model.spec.layers)
  settled = [i for i in layers if depth.at(i, len(layers)).traits(model.spec).fixed]
  if not settled:
    return []
  tokens = np.zeros((1, 1), np.int32)
  _, seen = model.apply({'params': params, **state}, tokens, mode='eval', mutable=['gates'])
  return [i for i in settled if not np.any(seen['gates'][Part.DEPTH.of(i)]['active'])]


def kept_weights(packed_model: PackedModel) -> float:
  """Returns the fraction of the weights of all packable kernels that packing kept.

  It can be lower than the masks' density, because packing removes units that masks disconnect.
  """
  plan = plan_of(packed_model.model)
  shapes = {path: plan.shapes[path].shape for path in plan.packable}
  whole = sum(math.prod(shape) for path, shape in shapes.items() if _is_kernel(path, shape))
  left = sum(np.count_nonzero(m.runs.kernel()) for m in packed_model.matrices.values())
  return left / whole


def total_bytes(tree_: Tree) -> int:
  """Returns the bytes of all arrays in a tree, packed kernels included."""
  leaves = jax.tree.leaves(tree_, is_leaf=is_packed)
  return sum(leaf.nbytes for leaf in leaves)
