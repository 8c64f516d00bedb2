"""One-shot pruning by the inputs of each matrix: the base class of such methods, and OBS updates.

`python -m sparse_lm.prune` calls `update` once for each layer, with signals for that layer's matrices
only. So each layer is pruned with the inputs that the pruned layers before it produce.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Pattern
from sparse_lm.kernels.topk import topk_mask
from sparse_lm.weights.checks import DeclaredSignals
from sparse_lm.weights.method import (
  Array,
  MaskUpdate,
  PatternMethod,
  Sparse,
  full_masks,
  restrict_to,
)


@dataclasses.dataclass(frozen=True)
class OneShot(PatternMethod):
  """Base class: keeps every weight until `update` prunes the leaves that have signals."""

  @property
  def one_shot(self) -> bool:
    """True: the method prunes trained models."""
    return True

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts with masks that keep every weight."""
    return {'params': params, 'learned': {}}, Sparse(full_masks(params, target), target)

  def prune(self, params: Tree, signals: dict[str, Tree], target: Tree) -> tuple[Tree, Tree]:
    """Returns new weights and masks of the leaves in `params`; all three trees have the same leaves."""
    raise NotImplementedError(type(self).__name__)

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Prunes the leaves that have signals; the others do not change."""
    params, present = trainable['params'], next(iter(signals.values()))
    declared = DeclaredSignals(signals, f'{type(self).__name__}.prune', self.traits.needs)
    weights, masks = self.prune(
      restrict_to(params, present), declared, restrict_to(sparse.target, present)
    )
    kept = tree.merge(sparse.masks, masks)
    changed = jax.tree.map(lambda old, new: old != new, sparse.masks, kept)
    return MaskUpdate(
      trainable | {'params': tree.merge(params, weights)}, sparse.replace(masks=kept), changed
    )


@functools.partial(jax.jit, static_argnames=('groups', 'damp', 'block'))
def prune_by_obs(
  weights: Array,
  gram: Array,
  density: Array,
  groups: Pattern | None = None,
  damp: float = 0.01,
  block: int = 128,
) -> tuple[Array, Array]:
  """Prunes one matrix by SparseGPT (Frantar and Alistarh 2023, algorithm 1; their `sparsegpt.py`).

  Inputs are pruned in order. The error of pruning input j is corrected by the weights of the inputs after
  it, through the rows of the upper Cholesky factor U of the inverse Gram matrix: `err = (w - q) / U_jj`,
  `W[j:] -= U[j, j:] err`. The mask of a block of inputs is chosen when the block starts: the weights of
  smallest `w^2 / U_jj^2`, over the block's inputs and all outputs, are dropped. The mask of an N:M group
  is chosen when the group starts.

  Args:
    weights: `[in, out]`; the computation runs in the dtype of `gram`.
    gram: `[in, in]`, the mean outer product of the inputs, up to a positive factor.
    density: scalar, the fraction of the weights that is kept; exact over the whole matrix.
    groups: a pattern that chooses the masks of a group of consecutive inputs, such as N:M; `None` =
      unstructured.
    damp: number added to the diagonal of the Gram matrix, divided by the diagonal's mean.
    block: number of inputs whose corrections of later inputs are applied together.

  Returns:
    The new weights, zero outside the mask, and the mask.
  """
  inputs, outputs = weights.shape
  if groups:
    block = groups.inputs_per_group * max(1, block // groups.inputs_per_group)
  w = weights.astype(gram.dtype)
  u, dead = _inverse_factor(gram, damp)
  w = jnp.where(dead[:, None], 0, w)
  diagonal = jnp.diagonal(u)
  mask = jnp.zeros(w.shape, bool)
  for begin in range(0, inputs, block):
    end = min(begin + block, inputs)
    rows, factor = w[begin:end], u[begin:end, begin:end]
    if groups is None:
      # Counts of the blocks are differences of rounded cumulative counts, so they add up to the matrix's.
      before, after = (jnp.round(n * outputs * density) for n in (begin, end))
      count = (after - before).astype(jnp.int32)
      kept = topk_mask(jnp.square(rows / diagonal[begin:end, None]), count)
    else:
      kept = jnp.zeros(rows.shape, bool)
    rows, kept, errors = _sweep(rows, factor, kept, density, groups)
    w = w.at[begin:end].set(rows).at[end:].add(-u[begin:end, end:].T @ errors)
    mask = mask.at[begin:end].set(kept)
  return jnp.where(mask, w, 0).astype(weights.dtype), mask


def _inverse_factor(gram: Array, damp: float) -> tuple[Array, Array]:
  """Returns U (`U^T U` is the inverse of the damped Gram matrix) and a mask of inputs that are zero."""
  dead = jnp.diagonal(gram) == 0
  h = gram + jnp.diag(dead.astype(gram.dtype))
  h = h + damp * jnp.mean(jnp.diagonal(h)) * jnp.eye(len(h), dtype=h.dtype)
  inverse = jax.scipy.linalg.cho_solve(
    (jnp.linalg.cholesky(h), True), jnp.eye(len(h), dtype=h.dtype)
  )
  return jnp.linalg.cholesky((inverse + inverse.T) / 2).T, dead


def _sweep(
  rows: Array, factor: Array, kept: Array, density: Array, groups: Pattern | None
) -> tuple[Array, Array, Array]:
  """Prunes a block input by input; returns its rows, mask and errors, each `[block, out]`."""
  diagonal = jnp.diagonal(factor)

  def regroup(j: Array, rows: Array, kept: Array) -> Array:
    here = jax.lax.dynamic_slice_in_dim(rows, j, groups.inputs_per_group)
    scores = jnp.square(
      here / jax.lax.dynamic_slice_in_dim(diagonal, j, groups.inputs_per_group)[:, None]
    )
    chosen = groups.top(
      scores, jnp.round(density * scores.size)
    )  # all weights of a group if the density is 1
    return jax.lax.dynamic_update_slice_in_dim(kept, chosen, j, axis=0)

  def prune_one(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    rows, kept, errors = carry
    if groups is not None:
      kept = jax.lax.cond(
        j % groups.inputs_per_group == 0, lambda k: regroup(j, rows, k), lambda k: k, kept
      )
    error = jnp.where(kept[j], 0, rows[j]) / diagonal[j]
    # U is upper triangular: its row is zero before j.
    rows = rows - factor[j][:, None] * error[None]
    return rows, kept, errors.at[j].set(error)

  return jax.lax.fori_loop(0, len(rows), prune_one, (rows, kept, jnp.zeros_like(rows)))
