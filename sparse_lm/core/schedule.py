"""Schedules: at which steps masks change, and the density at each step.

`step` is the number of optimizer steps completed so far. `due` runs on the host and chooses between two
compiled steps; the densities and fractions are traced.
"""

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import require, unknown

CUBIC, AT_ONCE, AT_START = RAMPS = ('cubic', 'at_once', 'at_start')


def span(start: float, end: float, total_steps: int) -> tuple[int, int]:
  """Converts a span from fractions of the run to its first and last step, both before `total_steps`."""
  first, last = (min(round(share * total_steps), total_steps - 1) for share in (start, end))
  return first, last


def ramp_span(ramp: str, start: float, end: float, total_steps: int) -> tuple[int, int]:
  """Returns the first and last step of a ramp.

  Both are `start` for the ramp that prunes all at once, and step 0 for the one that prunes at the start.
  """
  if ramp == AT_START:
    return 0, 0
  return span(start, start if ramp == AT_ONCE else end, total_steps)


def check(ramp: str, start: float, end: float) -> None:
  """Raises a UserError if the ramp is unknown or ends before it starts.

  Args:
    ramp: one of `RAMPS`.
    start: start of the ramp, as a fraction of the run.
    end: end of the ramp, as a fraction of the run.
  """
  if ramp not in RAMPS:
    raise unknown('config.weight.schedule', ramp, RAMPS)
  if ramp == CUBIC:
    require(start <= end, 'config.weight.end', end, f'config.weight.start={start} or more')


def due(step: int, first: int, last: int, period: int) -> bool:
  """Returns whether a mask update is due: every `period` steps from `first` to `last`, and at `last`."""
  return first <= step <= last and ((step - first) % period == 0 or step == last)


def cubic_density(
  step: int | jax.Array, first: int, last: int, final: float | jax.Array
) -> jax.Array:
  """Returns the density at a step of a cubic ramp (Zhu & Gupta 2017, equation 1).

  The density is 1 up to step `first`, and `final` from step `last` on. In between, the sparsity is
  `(1 - final) (1 - (1 - progress)^3)`.
  """
  progress = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
  progress = jnp.where(step >= last, 1.0, progress)  # also if first == last
  return 1.0 - (1.0 - final) * (1.0 - (1.0 - progress) ** 3)


def linear_density(
  step: int | jax.Array, first: int, last: int, final: float | jax.Array
) -> jax.Array:
  """Returns the density at a step: 1 until `first`, `final` from `last`, linear in between."""
  progress = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
  progress = jnp.where(step >= last, 1.0, progress)
  return 1.0 - (1.0 - final) * progress


def cosine_fraction(step: int | jax.Array, last: int, initial: float) -> jax.Array:
  """Returns the fraction of weights to replace: `initial` at step 0, half a cosine down to 0 at `last`.

  This is the schedule of RigL (Evci et al. 2020, section 3).
  """
  progress = jnp.clip(step / max(last, 1), 0.0, 1.0)
  return initial / 2 * (1.0 + jnp.cos(jnp.pi * progress))
