"""What the connections did: density and flip rate, leaf by leaf."""

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.sparse import Tree


@jax.jit
def _counts(masks: Tree, before: Tree) -> Tree:
  return jax.tree.map(lambda new, old: (jnp.mean(new), jnp.mean(new != old)), masks, before)


def connections(masks: Tree, before: Tree) -> dict[str, float]:
  """`density/<path>` and `flips/<path>`, the share of a mask's bits that differ from `before`."""
  counted = jax.device_get(_counts(masks, before))
  observed: dict[str, float] = {}
  for path, value in tree.named(counted).items():
    leaf, _, which = path.rpartition('/')
    observed[f'{"density" if which == "0" else "flips"}/{leaf}'] = float(value)
  return observed
