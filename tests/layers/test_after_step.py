"""Variables that change once per optimizer step, against sums in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from numpy.testing import assert_array_equal

from sparse_lm.layers.after_step import UPDATES, after_step, updated


@dataclasses.dataclass(frozen=True)
class Add:
  scale: float

  def __call__(self, value, total):
    return value + self.scale * jnp.max(total)


class Counter(nn.Module):
  scale: float
  pooled: bool = False

  @nn.compact
  def __call__(self, x):
    count = self.variable('router', 'count', lambda: jnp.float32(1))
    self.variable('router', 'other', lambda: jnp.float32(7))
    after_step(self, 'router', 'count', x, Add(self.scale), self.pooled)
    return count.value


class Several(nn.Module):
  """Two modules that pool, one with another rule that does too, and one that is called twice."""

  @nn.compact
  def __call__(self, x):
    read = Counter(2.0, True, name='a')(x), Counter(2.0, True, name='b')(10 * x)
    twice = Counter(0.5, name='d')
    return *read, Counter(3.0, True, name='c')(x), twice(x), twice(100 * x)


def test_rules_get_sums_over_microbatches_and_forward_passes_read_old_values():
  x = jnp.array([1, 4, 2])
  start = jax.tree.map(lambda _: jnp.float32(1), Several().init(jax.random.key(0), x)['router'])
  read, sown = Several().apply({'router': start}, x, mutable=[UPDATES])
  assert_array_equal(read, np.ones(5))
  after = jax.jit(updated)({'router': start, 'kept': {'a': {'count': x}}}, sown[UPDATES])
  counts = {name: float(found['count']) for name, found in after['router'].items()}
  assert counts == {'a': 1 + 2 * 44, 'b': 1 + 2 * 44, 'c': 1 + 3 * 4, 'd': 1 + 0.5 * 404}
  assert {float(found['other']) for found in after['router'].values()} == {1.0}
  assert_array_equal(after['kept']['a']['count'], x)
  # Without a place to sow to nothing happens, and without updates nothing changes.
  assert_array_equal(Several().apply({'router': start}, x), np.ones(5))
  jax.tree.map(assert_array_equal, updated({'router': start}, {}), {'router': start})
