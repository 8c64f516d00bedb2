"""Weight methods that are a score: the base class, and all that a config chooses beside the score.

Such a method scores weights, keeps the units of the largest scores within a budget and applies the
mask. The score is the class; when, how many, which sets of weights and how the mask is applied are
fields.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_lm.core import schedule, tree
from sparse_lm.core.errors import require, unknown
from sparse_lm.core.estimator import straight_through, with_gradient_of, with_gradient_to_score
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Units, per_matrix
from sparse_lm.signals import from_calibration, from_training
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
  """Starts dense and keeps the units of the largest scores, as many as a schedule allows.

  A subclass defines `scores`. One whose scores are trainable also sets `learns_scores` in its traits
  and may define `first_scores`.

  Attributes:
    schedule: 'cubic', a ramp from dense at `start` to the target at `end` (Zhu and Gupta 2017, equation
      1); 'at_once', the target from `start` on, without a ramp: then `end` is not read; or 'at_start',
      the target before the first step, and the same masks to the end: then neither is read.
    start, end: fractions of the run.
    batches: of training text, over which 'at_start' takes the mean of each signal that the scores need.
    shuffle: whether the masks that 'at_start' chooses are then shuffled within each matrix, which leaves
      nothing of the scores but how many weights each matrix keeps: a control.
    period: steps between two updates of stored masks along the ramp. Masks that are not stored are
      chosen in every step.
    apply: what becomes of a dropped weight, and of its gradient.
      'masked': it is zero for good. Masks are stored, and later ones are subsets of earlier ones. Masks
        from trainable scores are not stored: there a dropped weight stays and gets no gradient.
      'straight_through': it keeps its value, the model sees zero, and it gets the gradient of what the
        model sees (Bengio et al. 2013). The mask is chosen anew in every step.
      'soft': the same, and a kept weight is shrunk by the share that the largest dropped score has of
        its own, so that no weight jumps as it is dropped: on magnitudes this is the soft threshold
        `sign(w) max(|w| - threshold, 0)`.
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
    """Every score that is not learned prunes trained models too."""
    return not self.traits.learns_scores

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """The score of every weight, float, shaped like the parameters; the largest are kept.

    Args:
      trainable: `params` holds the prunable leaves that are to be scored and `None` for the others, so
        that `jax.tree.map(f, trainable['params'], signals['grads'])` meets arrays alone. `learned` is
        what `first_scores` returned, as trained.
      signals: those of `traits.needs`, by name, for the same leaves.
    """
    raise NotImplementedError(type(self).__name__)

  def first_scores(self, key: Array, params: Tree) -> Tree:
    """The trainable scores at step 0, for the prunable leaves in `params` (`None` elsewhere).

    They are zeros, float32, unless a subclass says otherwise; `{}` where scores are not trainable.
    """
    if not self.traits.learns_scores:
      return {}
    return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)

  def check(self) -> None:
    """Raises UserError for an unknown choice, or for choices that do not go together."""
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
      f'{MASKED}: the scores are of {", ".join(needs)}, which are there when masks are updated',
    )
    require(
      not from_calibration(needs) or not units.spans_layers,
      'config.weight.pattern',
      self.pattern,
      'a pattern whose units are each of one layer',
    )

  def check_one_shot(self) -> None:
    """Raises UserError where the masks that pruning makes would not be stored."""
    require(self._stored, 'config.weight.apply', self.apply, f'{MASKED}, where a mask is made once')

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts from masks that keep every weight, or from none where masks are not stored."""
    nothing = jax.tree.map(lambda w: None, params)
    masks = full_masks(params, target) if self._stored else nothing
    learned = self.first_scores(key, restrict_to(params, target))
    return {'params': params, 'learned': learned}, Sparse(masks, target)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Weights under the stored masks, or under masks that are chosen here."""
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
    """`batches` where the schedule is 'at_start' and the scores need signals."""
    if self.schedule != schedule.AT_START:
      return None
    return self.batches if from_training(self.traits.needs) else 0

  def due(self, step: int) -> bool:
    """Every `period` steps along the ramp, and at its end, where masks are stored."""
    return self._updates and schedule.due(step, *self._span, self.period)

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Keeps the largest scores of the living weights, as many as the ramp allows at `step`.

    Where the signals cover some leaves only, those alone are updated.
    """
    everywhere = tree.named(sparse.masks).keys()
    present = functools.reduce(
      lambda paths, found: paths & tree.named(found).keys(), signals.values(), everywhere
    )
    masks, target = tree.only(present, sparse.masks), tree.only(present, sparse.target)
    scores = self.scores(
      trainable | {'params': tree.only(present, trainable['params'])},
      {name: tree.only(present, found) for name, found in signals.items()},
    )
    alive, units = self.units.alive(masks), self.units.pool(scores)
    # Dropped units rank last, behind every living one.
    ranked = {name: jnp.where(alive[name], array, -jnp.inf) for name, array in units.items()}
    chosen = self.units.select(ranked, self._densities(target, scores, step), scores)
    # The ramp of a run that is continued with more steps is stretched and may lie above the masks.
    subset = {name: chosen[name] & alive[name] for name in chosen}
    new = self.units.expand(subset, scores)
    if self.shuffle:
      new = shuffled(key, new)
    return exchange_masks(trainable, sparse, tree.merge(sparse.masks, new))

  def density(self, target: float, step: int) -> float:
    """The ramp, as updates follow it where masks are stored."""
    first, last = self._span
    if self._updates:
      if step <= first:
        return 1.0
      step = last if step > last else first + (step - 1 - first) // self.period * self.period
    return float(schedule.cubic_density(step, first, last, target))

  def backward_density(self, target: float, step: int) -> float | None:
    """All of the gradient where dropped weights or trainable scores learn from it."""
    if self.apply != MASKED or self.traits.learns_scores:
      return 1.0
    return super().backward_density(target, step)

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """What `effective` shows to the model at `step`, and its masks."""
    if self._stored:
      return super().finalize(trainable, sparse, step)
    masks, shrink, _ = self._choose(trainable, sparse, step)
    return apply_masks(self._seen(trainable['params'], masks, shrink), masks), masks

  @property
  def _stored(self) -> bool:
    """Whether masks are kept from step to step, and not chosen in every forward pass."""
    return self.apply == MASKED and not self.traits.learns_scores

  @property
  def _updates(self) -> bool:
    """Whether stored masks change between steps."""
    return self._stored and self.schedule != schedule.AT_START

  @property
  def _span(self) -> tuple[int, int]:
    return schedule.ramp_span(self.schedule, self.start, self.end, self.total_steps)

  def _densities(self, target: Tree, like: Tree, step: Array) -> dict[str, Array]:
    """The density of each array of units at `step`."""
    return {
      name: schedule.cubic_density(step, *self._span, final)
      for name, final in self.units.densities(target, like).items()
    }

  def _choose(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree, Tree]:
    """Masks, what each kept weight is multiplied with, and scores, all for the prunable leaves."""
    params = restrict_to(trainable['params'], sparse.target)
    scores = self.scores(trainable | {'params': params}, {})
    units = self.units.pool(jax.lax.stop_gradient(scores))
    keeps = self.units.select(units, self._densities(sparse.target, params, step), params)
    masks = self.units.expand(keeps, params)
    if self.apply != SOFT:
      return masks, None, scores
    return masks, self.units.expand(self._shrink(units, keeps), params), scores

  def _shrink(self, units: Units, keeps: Units) -> Units:
    """One less the share that the largest dropped score has of each score, in [0, 1]."""

    def shrink(scores: Array, keeps: Array) -> Array:
      left = scores - self.units.threshold(scores, keeps)
      return jnp.clip(left / jnp.maximum(jnp.abs(scores), 1e-30), 0.0, 1.0)

    return {name: per_matrix(shrink, array, keeps[name]) for name, array in units.items()}

  def _seen(self, params: Tree, masks: Tree, shrink: Tree) -> Tree:
    """Weights as the model sees them, with the gradient that `apply` gives to each."""
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
