"""The scale of a norm and its gradient, in float32 and in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.kernels.scale import scaled


def drawn(tokens=6):
  draw = np.random.default_rng(0)
  x, scale, dy = (
    draw.normal(size=shape).astype('f') for shape in ((2, tokens, 5), 5, (2, tokens, 5))
  )
  return jnp.asarray(x), jnp.asarray(scale), jnp.asarray(dy)


def test_in_float32_it_is_the_product_to_the_bit():
  x, scale, dy = drawn()
  found, pull = jax.vjp(lambda x, s: scaled(x, s, jnp.dtype('float32')), x, scale)
  want, pull_plain = jax.vjp(lambda x, s: x * s, x, scale)
  assert_array_equal(found, want)
  jax.tree.map(assert_array_equal, pull(dy), pull_plain(dy))


@pytest.mark.parametrize('batched', [False, True])
def test_in_bfloat16_the_gradient_is_that_of_the_rounded_product(batched):
  x, scale, dy = drawn()
  dtype = jnp.dtype('bfloat16')

  def gradient(x, scale, dy):
    found, pull = jax.vjp(lambda x, s: scaled(x, s, dtype), x, scale)
    return found, *pull(dy.astype(dtype))

  if batched:
    first, *others = (jnp.stack([a, 2 * a]) for a in (x, scale, dy))
    found, dx, dscale = (a[0] for a in jax.jit(jax.vmap(gradient))(first, *others))
  else:
    found, dx, dscale = jax.jit(gradient)(x, scale, dy)
  assert found.dtype == dtype and dx.dtype == dscale.dtype == np.float32
  assert_array_equal(found, (x * scale).astype(dtype))
  rounded = np.asarray(dy.astype(dtype), 'f8')
  assert_allclose(dx, rounded * np.asarray(scale, 'f8'), rtol=1e-6)
  terms = rounded * np.asarray(x, 'f8')
  assert_allclose(dscale, terms.sum((0, 1)), atol=2**-8 * np.abs(terms).sum((0, 1)).max())


def test_what_is_rounded_is_added_up_in_float32():
  x, dy = jnp.ones((1, 1000, 1)), jnp.ones((1, 1000, 1), 'bfloat16')
  _, pull = jax.vjp(lambda s: scaled(x, s, jnp.dtype('bfloat16')), jnp.ones(1))
  assert float(pull(dy)[0][0]) == 1000.0  # sums of ones in bfloat16 stop at 256
