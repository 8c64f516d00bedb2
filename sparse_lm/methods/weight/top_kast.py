"""Top-KAST: a sparse forward pass, and gradients for a larger set of weights."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from sparse_lm.core import tree
from sparse_lm.core.errors import unknown
from sparse_lm.core.estimator import straight_through
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import (
  Array,
  MaskUpdate,
  PatternMethod,
  Sparse,
  densities,
  restrict_to,
)
from sparse_lm.weights.traits import Traits

DISPLAY_NAME = 'Top-KAST'

FORWARD, BACKWARD = 'forward', 'backward'  # the keys of the sets in `Sparse.extra`
NORMS = {
  'l1': lambda w: jnp.sum(w * jnp.sign(w), dtype=jnp.float32),  # the gradient at zero is zero
  'l2': lambda w: optax.safe_norm(
    w.astype(jnp.float32), 0.0
  ),  # the gradient at zeros is zero, not NaN
}


@dataclasses.dataclass(frozen=True)
class TopKAST(PatternMethod):
  """The model uses the largest weights; training updates these and the next largest weights.

  The forward set holds the units of largest mean magnitude, at the density d. The backward set adds the
  units that follow in magnitude. Weights of the backward set get the gradient of the loss at the weights
  that the model uses. All other weights keep their values, moments and averages exactly.

  Differs from the paper: a matrix of density 1 has no penalty, so it is trained as in a dense model.

  Attributes:
    backward_share: share of the weights outside the forward set that the backward set adds. The density
      of the backward set is `d + backward_share (1 - d)`, before rounding to whole units.
    penalty_weight: coefficient of `norm(F) + norm(B) / d`, summed over the matrices. F are the weights of
      the forward set, B the weights of the backward set that are not in the forward set.
    norm: 'l1', the sum of magnitudes as in the paper; or 'l2', the Euclidean norm as in
      A-Klass/torch_topkast.
    period: steps between two choices of the sets; the first choice is at step 0.
  """

  backward_share: float = ranged(0.5, '[0, 1]')
  penalty_weight: float = ranged(1e-4, '[0, inf)', traced=True)
  norm: str = 'l1'
  period: int = ranged(100, '[1, 2^31)')
  traits: ClassVar[Traits] = Traits(
    paper='Top-KAST: Top-K Always Sparse Training (Jayakumar et al. 2020)',
    saves='the forward pass outside the forward set, and gradients outside the backward set; no memory',
  )

  def check(self) -> None:
    """Raises UserError for an unknown norm, or if the pattern's units cannot grow from zero."""
    if self.norm not in NORMS:
      raise unknown('config.weight.norm', self.norm, NORMS)
    self.check_growth()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Chooses the sets among the initial weights."""
    nothing = jax.tree.map(lambda _: None, params)
    return {'params': params, 'learned': {}}, Sparse(nothing, target, self._sets(params, target))

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Returns the weights of the forward set, zero elsewhere; the backward set gets the gradient."""

    def seen(w: Array, forward: Array, backward: Array) -> Array:
      return straight_through(jnp.where(backward, w, jax.lax.stop_gradient(w)), forward)

    params, forward, backward = trainable['params'], sparse.extra[FORWARD], sparse.extra[BACKWARD]
    return tree.where_sparse(seen, params, forward, backward, dense=lambda w: w), densities(forward)

  def penalty(self, trainable: Tree, sparse: Sparse, density: Tree) -> Array:
    """Returns `penalty_weight` times the sum of norms that the class describes, over sparse matrices."""

    def paid(w: Array, forward: Array, backward: Array, target: Array) -> Array:
      norms = [NORMS[self.norm](jnp.where(part, w, 0)) for part in (forward, backward & ~forward)]
      return jnp.where(target < 1, norms[0] + norms[1] / target, 0.0)

    sets = sparse.extra[FORWARD], sparse.extra[BACKWARD], sparse.target
    found = tree.where_sparse(paid, trainable['params'], *sets, dense=lambda _: 0.0)
    return self.penalty_weight * sum(jax.tree.leaves(found), jnp.float32(0))

  def frozen(self, sparse: Sparse) -> Tree:
    """True for the weights outside the backward set."""
    return jax.tree.map(jnp.logical_not, sparse.extra[BACKWARD])

  def due(self, step: int) -> bool:
    """True every `period` steps, but not at step 0."""
    return step > 0 and step % self.period == 0

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Chooses new sets; no weight changes."""
    sets = self._sets(trainable['params'], sparse.target)
    return MaskUpdate(trainable, sparse.replace(extra=sets), toggled=sparse.masks)

  def backward_density(self, target: float, step: int) -> float:
    """The density of the backward set."""
    return target + self.backward_share * (1 - target)

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """Returns the weights of the forward set, and the masks of that set."""
    return self.effective(trainable, sparse, 'eval', step, None)[0], sparse.extra[FORWARD]

  def _sets(self, params: Tree, target: Tree) -> dict[str, Tree]:
    """Returns both sets by name: bool like the parameters, `None` = dense."""
    scores = jax.tree.map(jnp.abs, restrict_to(params, target))
    larger = jax.tree.map(lambda d: self.backward_density(d, 0), target)
    return {s: self.units.masks(scores, d) for s, d in ((FORWARD, target), (BACKWARD, larger))}
