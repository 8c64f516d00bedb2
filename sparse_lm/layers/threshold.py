"""Thresholds of activations that are calibrated on text (`train/thresholds.py`)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

# The collection of thresholds: float32 scalars by the name of the site whose activations they zero.
THRESHOLDS = 'thresholds'


def below(module: nn.Module, name: str, value: jax.Array) -> jax.Array:
  """Returns which activations of a site are smaller in magnitude than the site's threshold, bool.

  The threshold is a variable of the collection `THRESHOLDS` at the module's path. It starts at 0, which
  no magnitude is below; training does not change it.

  Args:
    module: the module of the site, in whose compact method this is called.
    name: name of the site in the module.
    value: the activations.
  """
  threshold = module.variable(THRESHOLDS, name, jnp.zeros, (), jnp.float32)
  return jnp.abs(jax.lax.stop_gradient(value)).astype(jnp.float32) < threshold.value
