"""The scores that kept units are above, by their definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.core.groups import Group, Member
from sparse_lm.patterns import pattern


@pytest.mark.parametrize('name', ['unstructured', '2:4', 'per_output', 'block:2', 'row', 'neuron'])
def test_a_threshold_is_the_largest_dropped_score_among_the_competitors_of_each_unit(name):
  group = Group('neuron', 'mlp', 8, (Member('w', -1),))
  units = pattern(name, (group,))
  scores = units.pool({'w': jnp.asarray(np.random.default_rng(3).random((8, 8)), jnp.float32)})
  (array,) = scores.values()
  keeps = units.top(array, array.size // 2)
  found = np.broadcast_to(units.threshold(array, keeps), array.shape)
  array, keeps = np.asarray(array), np.asarray(keeps)
  for place in np.ndindex(array.shape):
    rivals = np.ones(array.shape, bool)  # those that the unit at `place` competes with
    if name in ('2:4', 'per_output'):
      rivals = np.indices(array.shape)[1] == place[1]
    if name == '2:4':
      rivals &= np.indices(array.shape)[0] // 4 == place[0] // 4
    assert found[place] == array[rivals & ~keeps].max()
  assert not np.any(units.threshold(jnp.asarray(array), jnp.ones(array.shape, bool)))
