"""The base class of weight methods that are defined by a score.

Such a method scores all weights, keeps the units of the largest scores, and masks the others. A subclass
defines the score. Fields of the config choose the schedule, the sparsity, the pattern, and what happens
to dropped weights.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_lm.core import schedule, tree
from sparse_lm.core.errors import UserError, require, unknown
from sparse_lm.core.estimator import straight_through, with_gradient_of, with_gradient_to_score
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Units, per_matrix
from sparse_lm.signals import from_calibration, from_training
from sparse_lm.weights.checks import DeclaredSignals, non_finite
from sparse_lm.weights.method import (
  Array,
  MaskUpdate,
  PatternMethod,
  Sparse,
  apply_masks,
  densities,
  exchange_masks,
  full_masks,
  restrict_to,
)
from sparse_lm.weights.random_start import shuffled

MASKED, STRAIGHT_THROUGH, SOFT = APPLIES = ('masked', 'straight_through', 'soft')


@dataclasses.dataclass(frozen=True)
class ScoredMethod(PatternMethod):
  """Starts dense and keeps the units of the largest scores, at the density of a schedule.

  A subclass defines `scores`. If scores are learned, it also sets `learns_scores` in its traits, and may
  define `first_scores`.

  Attributes:
    schedule: 'cubic' is a ramp from dense at `start` to the target at `end` (Zhu and Gupta 2017, equation
      1). 'at_once' prunes to the target at `start`, and does not read `end`. 'at_start' prunes to the
      target before the first step and keeps these masks; it reads neither `start` nor `end`.
    start, end: start and end of the ramp, as fractions of the run.
    batches: number of batches over which 'at_start' averages the signals.
    shuffle: whether 'at_start' shuffles its masks within each matrix. This is a control experiment: only
      the number of kept weights of each matrix still depends on the scores.
    period: steps between two updates of stored masks along the ramp. Masks that are not stored are chosen
      in every step.
    apply: what happens to a dropped weight.

      - 'masked': it is zero for good. Masks are stored, and each mask is a subset of the one before
        it. Masks from learned scores are not stored; a dropped weight then keeps its value and gets no
        gradient.
      - 'straight_through': it keeps its value, and the model uses zero instead. It gets the gradient
        of the loss at this zero (Bengio et al. 2013). The mask is chosen in every step.
      - 'soft': like 'straight_through', and each kept weight is multiplied by 1 - t / s, where s is
        its score and t the largest dropped score. So a weight is near zero when it is dropped. For
        magnitudes this is the soft threshold `sign(w) max(|w| - t, 0)`.
  """

  schedule: str = 'cubic'
  start: float = ranged(0.25, '[0, 1]')
  end: float = ranged(0.75, '[0, 1]')
  batches: int = ranged(1, '[1, 2^31)')
  shuffle: bool = False
  period: int = ranged(100, '[1, 2^31)')
  apply: str = MASKED

  @property
  def one_shot(self) -> bool:
    """True if the scores are not learned."""
    return not self.traits.learns_scores

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """Returns the score of every weight, float, like the parameters; the largest scores are kept.

    Scores are finite. NaN or infinite scores end the run with an error.

    Args:
      trainable: `params` holds the prunable leaves, and `None` for all others, so
        `jax.tree.map(f, trainable['params'], signals['grads'])` applies `f` to arrays only. `learned`
        holds the learned scores, which `first_scores` initialised.
      signals: the signals in `traits.needs` by name, for the same leaves.
    """
    raise NotImplementedError(type(self).__name__)

  def first_scores(self, key: Array, params: Tree) -> Tree:
    """Returns the learned scores at step 0, for the prunable leaves; `{}` if none are learned.

    By default they are float32 zeros.
    """
    if not self.traits.learns_scores:
      return {}
    return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)

  def check(self) -> None:
    """Raises UserError for unknown choices, or for choices that exclude each other."""
    schedule.check(self.schedule, self.start, self.end)
    if self.apply not in APPLIES:
      raise unknown('config.weight.apply', self.apply, APPLIES)
    require(
      self.schedule != schedule.AT_START or self._stored,
      'config.weight.schedule',
      self.schedule,
      f'{schedule.CUBIC} or {schedule.AT_ONCE}: masks that are not stored are chosen in every step',
    )
    needs, units = self.traits.needs, self.units
    require(
      not self.shuffle or self.schedule == schedule.AT_START,
      'config.weight.shuffle',
      self.shuffle,
      f'False, or True with config.weight.schedule={schedule.AT_START}',
    )
    require(
      not self.shuffle or units.unconstrained,
      'config.weight.pattern',
      self.pattern,
      'a pattern in which any weights of a matrix may be kept, where config.weight.shuffle=True',
    )
    require(
      not needs or self.apply == MASKED,
      'config.weight.apply',
      self.apply,
      f'{MASKED}, because the scores read {", ".join(needs)}, which only mask updates compute',
    )
    require(
      not from_calibration(needs) or not units.spans_layers,
      'config.weight.pattern',
      self.pattern,
      'a pattern whose units each belong to one layer',
    )

  def check_one_shot(self) -> None:
    """Raises UserError if masks are not stored, which one-shot pruning needs."""
    require(self._stored, 'config.weight.apply', self.apply, f'{MASKED}, which stores masks')

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts with masks that keep every weight, or without masks if they are not stored."""
    nothing = jax.tree.map(lambda w: None, params)
    masks = full_masks(params, target) if self._stored else nothing
    learned = self.first_scores(key, restrict_to(params, target))
    return {'params': params, 'learned': learned}, Sparse(masks, target)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Returns the masked weights; masks that are not stored are chosen here."""
    if self._stored:
      return super().effective(trainable, sparse, mode, step, key)
    fixed = trainable | {'params': jax.lax.stop_gradient(trainable['params'])}
    masks, shrink, scores = self._choose(fixed, sparse, step)
    seen = self._seen(trainable['params'], masks, shrink)
    if self.traits.learns_scores:
      seen = tree.where_sparse(
        with_gradient_to_score, seen, scores, fixed['params'], dense=lambda w: w
      )
    return seen, densities(masks)

  @property
  def batches_at_start(self) -> int | None:
    """`batches` (0 without signals) if the schedule is 'at_start', else `None`."""
    if self.schedule != schedule.AT_START:
      return None
    return self.batches if from_training(self.traits.needs) else 0

  def due(self, step: int) -> bool:
    """True every `period` steps along the ramp, and at its end, if masks are stored."""
    return self._updates and schedule.due(step, *self._span, self.period)

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Keeps the largest scores among the kept weights, at the density of the ramp at `step`.

    Leaves without signals are not updated.
    """
    everywhere = tree.named(sparse.masks).keys()
    present = functools.reduce(
      lambda paths, found: paths & tree.named(found).keys(), signals.values(), everywhere
    )
    masks, target = tree.only(present, sparse.masks), tree.only(present, sparse.target)
    scores = self._checked_scores(
      trainable | {'params': tree.only(present, trainable['params'])},
      {name: tree.only(present, found) for name, found in signals.items()},
    )
    alive, units = self.units.alive(masks), self.units.pool(scores)
    # Dropped units rank after all kept units.
    ranked = {name: jnp.where(alive[name], array, -jnp.inf) for name, array in units.items()}
    chosen = self.units.select(ranked, self._densities(target, scores, step), scores)
    # If a run is continued with more steps, its ramp is stretched and may be denser than the masks.
    subset = {name: chosen[name] & alive[name] for name in chosen}
    new = self.units.expand(subset, scores)
    if self.shuffle:
      new = shuffled(key, new)
    change = exchange_masks(trainable, sparse, tree.merge(sparse.masks, new))
    return change.replace(non_finite=non_finite(tree.named(scores)))

  def non_finite(self, trainable: Tree, sparse: Sparse, step: Array) -> dict[str, Array]:
    """Returns for each matrix whether a score is NaN or infinite, if masks are not stored."""
    if self._stored:
      return {}
    _, _, scores = self._choose(trainable, sparse, step)
    return non_finite(tree.named(scores))

  def density(self, target: float, step: int) -> float:
    """Returns the ramp's density at the last mask update, or at `step` if masks are not stored."""
    first, last = self._span
    if self._updates:
      if step <= first:
        return 1.0
      step = last if step > last else first + (step - 1 - first) // self.period * self.period
    return float(schedule.cubic_density(step, first, last, target))

  def backward_density(self, target: float, step: int) -> float | None:
    """1 if dropped weights or scores learn from the gradient."""
    if self.apply != MASKED or self.traits.learns_scores:
      return 1.0
    return super().backward_density(target, step)

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """Returns the weights that the model uses at `step`, and their masks."""
    if self._stored:
      return super().finalize(trainable, sparse, step)
    masks, shrink, _ = self._choose(trainable, sparse, step)
    return apply_masks(self._seen(trainable['params'], masks, shrink), masks), masks

  @property
  def _stored(self) -> bool:
    """True if masks are state; otherwise every forward pass chooses them."""
    return self.apply == MASKED and not self.traits.learns_scores

  @property
  def _updates(self) -> bool:
    """True if stored masks change during training."""
    return self._stored and self.schedule != schedule.AT_START

  @property
  def _span(self) -> tuple[int, int]:
    return schedule.ramp_span(self.schedule, self.start, self.end, self.total_steps)

  def _densities(self, target: Tree, like: Tree, step: Array) -> dict[str, Array]:
    """Returns the density of each array of units at `step`."""
    return {
      name: schedule.cubic_density(step, *self._span, final)
      for name, final in self.units.densities(target, like).items()
    }

  def _checked_scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """Returns `scores`. Raises UserError for other leaves or shapes than those of the weights.

    Scores that broadcast would rank weights, but not as their author meant.
    """
    reader = f'{type(self).__name__}.scores'
    scores = self.scores(trainable, DeclaredSignals(signals, reader, self.traits.needs))
    have, want = tree.named(scores), tree.named(trainable['params'])
    for path in {**want, **have}:
      found, valid = (jnp.shape(one[path]) if path in one else None for one in (have, want))
      if found != valid:
        raise UserError(f'{reader} gives {path} the shape {found}; valid: {valid}, its own')
    return scores

  def _choose(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree, Tree]:
    """Returns masks, factors of the kept weights (`None` = 1) and scores, for the prunable leaves."""
    params = restrict_to(trainable['params'], sparse.target)
    scores = self._checked_scores(trainable | {'params': params}, {})
    units = self.units.pool(jax.lax.stop_gradient(scores))
    keeps = self.units.select(units, self._densities(sparse.target, params, step), params)
    masks = self.units.expand(keeps, params)
    if self.apply != SOFT:
      return masks, None, scores
    return masks, self.units.expand(self._shrink(units, keeps), params), scores

  def _shrink(self, units: Units, keeps: Units) -> Units:
    """Returns 1 - t / s for each score s, t the largest dropped score, clipped to [0, 1]."""

    def shrink(scores: Array, keeps: Array) -> Array:
      left = scores - self.units.threshold(scores, keeps)
      return jnp.clip(left / jnp.maximum(jnp.abs(scores), 1e-30), 0.0, 1.0)

    return {name: per_matrix(shrink, array, keeps[name]) for name, array in units.items()}

  def _seen(self, params: Tree, masks: Tree, shrink: Tree) -> Tree:
    """Returns the weights that the model uses, with the gradients that `apply` defines."""
    if self.apply == MASKED:
      return apply_masks(params, masks)
    if self.apply == STRAIGHT_THROUGH:
      return tree.where_sparse(straight_through, params, masks, dense=lambda w: w)
    return tree.where_sparse(
      lambda w, mask, factor: with_gradient_of(jnp.where(mask, w * factor, 0), w).astype(w.dtype),
      params,
      masks,
      shrink,
      dense=lambda w: w,
    )
