"""Optimizers and learning-rate schedules by name."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, require, unknown
from sparse_lm.core.ranges import traced
from sparse_lm.core.tree import Tree
from sparse_lm.train import rounding

SCHEDULES = ('cosine', 'linear', 'constant')
LEARNED = 'learned/'  # prefix of the paths of the weight method's own parameters


def _is_learned(path: str) -> bool:
  """Returns whether a leaf of the trainable tree belongs to the weight method."""
  return path.startswith(LEARNED)


def _matrices(trainable: Tree) -> Tree:
  return tree.map_named(lambda path, p: p.ndim >= 2 and not _is_learned(path), trainable)


def _divide_by_rms(gradients: Tree, _: Tree | None = None) -> Tree:
  """Divides the gradients by their root mean square over all parameters."""
  size = sum(leaf.size for leaf in jax.tree.leaves(gradients))
  rms = optax.tree.norm(gradients) / size**0.5
  return jax.tree.map(lambda g: g / (rms + 1e-5), gradients)


def _scale_rates(
  learned: tuple[tuple[str, float], ...],
) -> optax.GradientTransformationExtraArgs:
  """Scales the updates of the weight method's parameters by own rates, and all by the `rate_factor`."""

  def scale(path: str, update: jax.Array) -> jax.Array:
    fits = [rate for start, rate in learned if path.startswith(f'{LEARNED}{start}')]
    return fits[0] * update if fits else update

  def update(
    updates: Tree,
    state: Tree,
    params: Tree | None = None,
    *,
    rate_factor: jax.Array | None = None,
  ) -> tuple[Tree, Tree]:
    updates = tree.map_named(scale, updates)
    if rate_factor is not None:
      updates = jax.tree.map(lambda u: rate_factor * u, updates)
    return updates, state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _decay_last(weight_decay: float, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
  """Applies weight decay to matrices after the update: `w <- (1 - decay * rate) (w + update)`."""

  def init(params: Tree) -> optax.ScaleByScheduleState:
    return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

  def update(
    updates: Tree,
    state: optax.ScaleByScheduleState,
    params: Tree,
    *,
    rate_factor: jax.Array | None = None,
  ) -> tuple[Tree, Tree]:
    share = weight_decay * rate(state.count) * (1.0 if rate_factor is None else rate_factor)
    decayed = jax.tree.map(
      lambda u, p, matrix: u - share * (p + u) if matrix else u, updates, params, _matrices(params)
    )
    return decayed, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)


def _adam_like(make: Callable, **fixed: Callable[['Optimizer'], float]) -> Callable:
  return lambda rate, c: make(
    rate,
    b1=c.momentum,
    b2=c.b2,
    weight_decay=c.weight_decay,
    mask=_matrices,
    **{name: value(c) for name, value in fixed.items()},
  )


def _with_decay(direction: Callable[['Optimizer'], optax.GradientTransformation]) -> Callable:
  """Adds decoupled weight decay and the learning rate to a transformation that has neither."""
  return lambda rate, c: optax.chain(
    direction(c),
    optax.add_decayed_weights(c.weight_decay, mask=_matrices),
    optax.scale_by_learning_rate(rate),
  )


# Tested with masks: the moments of toggled weights can be zeroed, and dropped weights stay zero.
TESTED: dict[str, Callable] = {
  'adamw': _adam_like(optax.adamw, eps=lambda c: c.eps),
  'nadamw': _adam_like(optax.nadamw, eps=lambda c: c.eps),
  'lion': _adam_like(optax.lion),
  'sgd': _with_decay(lambda c: optax.trace(c.momentum)),
  'nesterov': _with_decay(lambda c: optax.trace(c.momentum, nesterov=True)),
  'rmsprop': _with_decay(lambda c: optax.scale_by_rms(c.b2)),
  'radam': _with_decay(lambda c: optax.scale_by_radam(c.momentum, c.b2)),
  'adabelief': _with_decay(lambda c: optax.scale_by_belief(c.momentum, c.b2)),
}
# Only for dense models: their state is not shaped like the parameters, or their updates mix weights.
DENSE_ONLY: dict[str, Callable] = {
  'adafactor': _with_decay(lambda c: optax.scale_by_factored_rms()),
  'sm3': _with_decay(lambda c: optax.scale_by_sm3(c.momentum)),
  'muon': lambda rate, c: optax.contrib.muon(rate, weight_decay=c.weight_decay),
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The fields of `config.optimizer`, which `configs/base.py` documents, for a run of `steps` steps.

  Attributes:
    learned_rates: learning rates of the weight method's own parameters, relative to the weights', by the
      prefix of a path.
  """

  name: str
  learning_rate: float = traced()
  schedule: str
  warmup: float
  final: float
  momentum: float
  b2: float
  eps: float
  weight_decay: float = traced()
  decay_last: bool
  clip: float
  normalize: bool
  ema: float
  steps: int
  learned_rates: tuple[tuple[str, float], ...] = ()

  @classmethod
  def from_config(
    cls, config: ConfigDict, masked: bool, learned_rates: Mapping[str, float]
  ) -> 'Optimizer':
    """Reads `config.optimizer`.

    Args:
      config: the whole config.
      masked: whether the weight method drops weights.
      learned_rates: as in `WeightMethod.learned_rates`.

    Raises:
      UserError: a field is not valid, or `masked` and the optimizer is not tested with masks.
    """
    rates = tuple(learned_rates.items())
    optimizer = cls(**config.optimizer, steps=config.train.steps, learned_rates=rates)
    optimizer._check(masked)
    return optimizer

  def _check(self, masked: bool) -> None:
    if self.name not in {**TESTED, **DENSE_ONLY}:
      raise unknown('config.optimizer.name', self.name, {**TESTED, **DENSE_ONLY})
    if masked and self.name not in TESTED:
      raise UserError(
        f'config.optimizer.name={self.name!r} is not tested with masks; valid: {", ".join(TESTED)}'
      )
    if self.schedule not in SCHEDULES:
      raise unknown('config.optimizer.schedule', self.schedule, SCHEDULES)
    valid = '0, because config.optimizer.normalize already fixes the norm of the gradient'
    require(not (self.clip and self.normalize), 'config.optimizer.clip', self.clip, valid)

  def rate(self) -> optax.Schedule:
    """Returns the schedule of the learning rate: linear warm-up, then a decay to `final` of the rate."""
    warmup = round(self.warmup * self.steps)
    left, lowest = max(self.steps - warmup, 1), self.final * self.learning_rate
    after = {
      'cosine': optax.cosine_decay_schedule(self.learning_rate, left, self.final),
      'linear': optax.linear_schedule(self.learning_rate, lowest, left),
      'constant': optax.constant_schedule(self.learning_rate),
    }[self.schedule]
    # The warm-up starts above zero, because a rate of zero would waste the first step.
    ramp = optax.linear_schedule(self.learning_rate / max(warmup, 1), self.learning_rate, warmup)
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after

  def transform(self) -> optax.GradientTransformationExtraArgs:
    """Returns the Optax transformation: clipping or normalization, the optimizer, and a final decay.

    State and updates are float32, whatever the dtype of the parameters. `update` takes a `rate_factor`,
    by which the learning rate of the step is multiplied; `None` means 1.
    """
    make = {**TESTED, **DENSE_ONLY}[self.name]
    first = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
    if self.normalize:
      first = optax.stateless(_divide_by_rms)
    stages = [first, make(self.rate(), self), _scale_rates(self.learned_rates)]
    if self.decay_last:
      undecayed = dataclasses.replace(self, weight_decay=0.0)
      stages[1] = make(self.rate(), undecayed)
      stages.append(_decay_last(self.weight_decay, self.rate()))
    return _in_float32(optax.chain(*stages))


def _in_float32(
  tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Gives a transformation float32 parameters and gradients, so that its state is float32 too."""

  def update(
    updates: Tree, state: Tree, params: Tree, *, rate_factor: jax.Array | None = None
  ) -> tuple[Tree, Tree]:
    updates, params = rounding.in_float32(updates), rounding.in_float32(params)
    return tx.update(updates, state, params, rate_factor=rate_factor)

  return optax.GradientTransformationExtraArgs(
    lambda params: tx.init(rounding.in_float32(params)), update
  )


def zero_moments(tx: optax.GradientTransformation, opt_state: Tree, changed: Tree) -> Tree:
  """Sets the moments of `changed` weights (bool, `None` for dense leaves) to zero, for any optimizer."""

  def zero(moment: jax.Array, flag: jax.Array | None) -> jax.Array:
    return moment if flag is None else jax.numpy.where(flag, 0, moment)

  return optax.tree_map_params(tx, zero, opt_state, changed, is_leaf=lambda x: x is None)


def update_unless_resting(
  tx: optax.GradientTransformationExtraArgs,
  gradients: Tree,
  opt_state: Tree,
  params: Tree,
  resting: Tree,
  rate_factor: jax.Array | None = None,
) -> tuple[Tree, Tree]:
  """Returns the updates and the new state of an optimizer step; resting weights and their state stay.

  Args:
    tx: the optimizer.
    gradients: gradients with respect to `params`.
    opt_state: the optimizer's state.
    params: the trainable tree.
    resting: for each leaf of `params`, a bool or a bool array of its shape.
    rate_factor: factor of the learning rate; `None` means 1.
  """
  updates, new_state = tx.update(gradients, opt_state, params, rate_factor=rate_factor)
  if all(rests is False for rests in jax.tree.leaves(resting)):
    return updates, new_state

  def unless(rests: bool | jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    if isinstance(rests, bool):
      return old if rests else new
    return jnp.where(rests, old, new)

  updates = jax.tree.map(lambda u, rests: unless(rests, jnp.zeros_like(u), u), updates, resting)
  # State that is not shaped like the parameters, such as the step count, is always updated.
  rests = optax.tree_map_params(
    tx, lambda _, flag: flag, new_state, resting, transform_non_params=lambda _: False
  )
  kept = jax.tree.map(lambda old, new, flag: unless(flag, old, new), opt_state, new_state, rests)
  return updates, kept
