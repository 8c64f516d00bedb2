"""ALPS: one-shot pruning by ADMM, followed by a least-squares fit of the kept weights."""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Pattern
from sparse_lm.weights.method import Array
from sparse_lm.weights.one_shot import OneShot
from sparse_lm.weights.traits import Traits

DISPLAY_NAME = 'ALPS'
# Pairs of a limit and a factor. Every `CHECK` iterations, the penalty is multiplied by the factor of the
# first limit that the changed fraction of the mask exceeds. ADMM ends when the mask has not changed.
CHECK = 3
FACTORS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclasses.dataclass(frozen=True)
class ALPS(OneShot):
  """Chooses the weights of each matrix that keep its outputs best, and fits them to the dense outputs.

  ADMM alternates between the weights that minimise the squared error of the outputs and the nearest
  weights that the pattern and the density allow. Then conjugate gradients minimise the error over the
  kept weights. Every pattern whose units each lie in one matrix is valid.

  Differs from the paper: ADMM starts from the trained weights without restarts, and each output has its
  own step size in the conjugate gradients.

  Attributes:
    damp: number that is added to the diagonal of the Gram matrix, as a multiple of the diagonal's mean.
    penalty: penalty of ADMM at the start (rho in the paper), for a Gram matrix of unit diagonal.
    iterations: maximum number of ADMM iterations.
    fits: iterations of conjugate gradients.
  """

  damp: float = ranged(0.01, '(0, inf)')
  penalty: float = ranged(0.1, '(0, inf)')
  iterations: int = ranged(300, '[1, 2^31)')
  fits: int = ranged(10, '[0, 2^31)')
  traits: ClassVar[Traits] = Traits(
    paper='Meng et al. 2024 (ALPS: Improved Optimization for Highly Sparse One-Shot Pruning), '
    'algorithms 1 and 2',
    saves='dropped weights, after training; pruning needs no gradient',
    needs=('xtx',),
  )

  def check(self) -> None:
    """Raises UserError unless the units of the pattern each lie in one matrix."""
    require(
      not self.units.spans_matrices and not self.units.spans_layers,
      'config.weight.pattern',
      self.pattern,
      'a pattern whose units each lie in one matrix, and are ranked within it',
    )

  def prune(self, params: Tree, signals: dict[str, Tree], target: Tree) -> tuple[Tree, Tree]:
    """Returns new weights and masks; `xtx` is the mean outer product `[in, in]` of a kernel's inputs."""
    grams, densities = tree.named(signals['xtx']), tree.named(target)
    found = {
      path: prune_by_admm(
        weights,
        grams[path],
        densities[path],
        (path, self.units),
        self.damp,
        self.penalty,
        self.iterations,
        self.fits,
      )
      for path, weights in tree.named(params).items()
    }
    return tuple(tree.map_named(lambda path, _, i=i: found[path][i], params) for i in (0, 1))


class _State(NamedTuple):
  """The state of ADMM.

  Attributes:
    sparse: D in the paper, `[in, out]`.
    dual: V in the paper, `[in, out]`.
    penalty: rho in the paper, scalar.
    support: the mask of D, bool `[in, out]`.
    checked: the mask at the last check, bool `[in, out]`.
    iteration: number of iterations so far, int32.
    moving: False if the mask did not change between the last two checks.
  """

  sparse: Array
  dual: Array
  penalty: Array
  support: Array
  checked: Array
  iteration: Array
  moving: Array


@functools.partial(jax.jit, static_argnames=('units', 'iterations', 'fits'))
def prune_by_admm(
  weights: Array,
  gram: Array,
  density: Array,
  units: tuple[str, Pattern],
  damp: float = 0.01,
  penalty: float = 0.1,
  iterations: int = 300,
  fits: int = 10,
) -> tuple[Array, Array]:
  """Prunes one matrix by ALPS.

  Args:
    weights: `[in, out]`; the computation runs in the dtype of `gram`.
    gram: `[in, in]`, the mean outer product of the inputs, up to a positive factor.
    density: scalar, the fraction of the weights that is kept.
    units: path of the matrix, and the pattern.
    damp, penalty, iterations, fits: the attributes of `ALPS`.

  Returns:
    The new weights, zero outside the mask, and the mask.
  """
  w = weights.astype(gram.dtype)
  dead = jnp.diagonal(gram) == 0
  w = jnp.where(dead[:, None], 0, w)
  h = gram + jnp.diag(dead.astype(gram.dtype))
  h = h + damp * jnp.mean(jnp.diagonal(h)) * jnp.eye(len(h), dtype=h.dtype)
  # Inputs are scaled so that the Gram matrix has a unit diagonal; `scale * w` are the weights for them.
  scale = jnp.sqrt(jnp.diagonal(h))
  h, dense = h / scale / scale[:, None], w * scale[:, None]
  wanted = h @ dense
  kept = _support(dense, h, wanted, density, units, penalty, iterations)
  fitted = _fit(jnp.where(kept, dense, 0), h, wanted, kept, fits)
  return (fitted / scale[:, None]).astype(weights.dtype), kept


def _nearest(weights: Array, density: Array, units: tuple[str, Pattern]) -> Array:
  """Returns the mask that the pattern and the density allow and that keeps the largest squares."""
  path, pattern = units
  masks = pattern.masks({path: jnp.square(weights)}, {path: density})
  return masks[path]


def _support(
  dense: Array,
  h: Array,
  wanted: Array,
  density: Array,
  units: tuple[str, Pattern],
  penalty: float,
  iterations: int,
) -> Array:
  """Returns the mask that ADMM finds (algorithm 1 of the paper)."""
  values, vectors = jnp.linalg.eigh(h)

  def step(state: _State) -> _State:
    rho = state.penalty
    right = vectors.T @ (wanted - state.dual + rho * state.sparse)
    free = vectors @ (right / (values + rho)[:, None])
    moved = free + state.dual / rho
    support = _nearest(moved, density, units)
    sparse = jnp.where(support, moved, 0)
    state = state._replace(
      sparse=sparse,
      dual=state.dual + rho * (free - sparse),
      support=support,
      iteration=state.iteration + 1,
    )
    return jax.lax.cond(state.iteration % CHECK == 0, _checked, lambda s: s, state)

  kept = _nearest(dense, density, units)
  first = _State(
    jnp.where(kept, dense, 0),
    jnp.zeros_like(dense),
    jnp.asarray(penalty, h.dtype),
    kept,
    jnp.zeros_like(kept),
    jnp.int32(0),
    jnp.bool_(True),
  )
  running = lambda state: state.moving & (state.iteration < iterations)  # noqa: E731
  return jax.lax.while_loop(running, step, first).support


def _checked(state: _State) -> _State:
  """Raises the penalty, by how much the mask changed since the last check, and notes if it changed."""
  changed = jnp.sum(state.support != state.checked) / jnp.maximum(jnp.sum(state.support), 1)
  factors = [factor for _, factor in FACTORS]
  factor = jnp.select([changed > share for share, _ in FACTORS], factors, 1.0)
  return state._replace(
    penalty=state.penalty * factor.astype(state.penalty.dtype),
    checked=state.support,
    moving=changed > 0,
  )


def _fit(start: Array, h: Array, wanted: Array, kept: Array, iterations: int) -> Array:
  """Minimises the error over the kept weights by conjugate gradients (algorithm 2 of the paper).

  The diagonal of `h` is one, so a Jacobi preconditioner would change nothing. Each output is a separate
  problem.
  """

  def step(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    w, residual, direction = carry
    along = jnp.where(kept, h @ direction, 0)
    square = jnp.sum(jnp.square(residual), axis=0)
    length = _ratio(square, jnp.sum(direction * along, axis=0))
    w, residual = w + length * direction, residual - length * along
    again = _ratio(jnp.sum(jnp.square(residual), axis=0), square)
    return w, residual, residual + again * direction

  residual = jnp.where(kept, wanted - h @ start, 0)
  return jax.lax.fori_loop(0, iterations, step, (start, residual, residual))[0]


def _ratio(above: Array, below: Array) -> Array:
  """Returns the ratio, or zero where the denominator is zero because the output is solved."""
  return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)
