"""When connections change, and how dense they are to be by then.

`step` is the number of optimizer steps completed before the present one. `due` runs on the host and
picks between two compiled steps; the others are traced.
"""

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import require, unknown

CUBIC, AT_ONCE, AT_START = RAMPS = ('cubic', 'at_once', 'at_start')


def span(start: float, end: float, total_steps: int) -> tuple[int, int]:
  """First and last step of a span given as fractions of the run; both are steps that it has."""
  first, last = (min(round(share * total_steps), total_steps - 1) for share in (start, end))
  return first, last


def ramp_span(ramp: str, start: float, end: float, total_steps: int) -> tuple[int, int]:
  """First and last step of a ramp; one that prunes at once ends where it starts, or at step 0."""
  if ramp == AT_START:
    return 0, 0
  return span(start, start if ramp == AT_ONCE else end, total_steps)


def check(ramp: str, start: float, end: float) -> None:
  """Raises UserError for an unknown ramp, or one that ends before it starts (as fractions of the run)."""
  if ramp not in RAMPS:
    raise unknown('config.weight.schedule', ramp, RAMPS)
  if ramp == CUBIC:
    require(start <= end, 'config.weight.end', end, f'config.weight.start={start} or more')


def due(step: int, first: int, last: int, period: int) -> bool:
  """Every `period` steps from `first` to `last`, and at `last` itself."""
  return first <= step <= last and ((step - first) % period == 0 or step == last)


def cubic_density(
  step: int | jax.Array, first: int, last: int, final: float | jax.Array
) -> jax.Array:
  """Density 1 until `first`, `final` from `last`, cubic between (Zhu & Gupta 2017, equation 1).

  `final` is a density; the sparsity 1 - density is `(1 - final) (1 - (1 - progress)^3)`.
  """
  progress = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
  progress = jnp.where(step >= last, 1.0, progress)  # a span of one step has no way to go
  return 1.0 - (1.0 - final) * (1.0 - (1.0 - progress) ** 3)


def linear_density(
  step: int | jax.Array, first: int, last: int, final: float | jax.Array
) -> jax.Array:
  """Density 1 until `first`, `final` from `last`, linear between."""
  progress = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
  progress = jnp.where(step >= last, 1.0, progress)
  return 1.0 - (1.0 - final) * progress


def cosine_fraction(step: int | jax.Array, last: int, initial: float) -> jax.Array:
  """`initial` at step 0, zero from `last`, half a cosine between (RigL 2020, section 3)."""
  progress = jnp.clip(step / max(last, 1), 0.0, 1.0)
  return initial / 2 * (1.0 + jnp.cos(jnp.pi * progress))
