"""Every packed format multiplies like the masked kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.inference import costs, formats
from sparse_lm.inference.pack import Kernel, choose
from sparse_lm.kernels import device
from sparse_lm.plan import executed

RUNNING = [name for name in formats.names() if formats.load(name).runs]
SHAPES = ((32, 48), (64, 16), (48, 96))
KINDS = ('full', 'weights', 'tiles', 'rows', 'columns', '2:4', '1:8', 'one weight', 'nothing')


def mask_of(kind, shape, draw):
  mask = np.zeros(shape, bool)
  if kind == 'full':
    return ~mask
  if kind == 'weights':
    return draw.random(shape) < 0.4
  if kind == 'tiles':
    tiles = draw.random((shape[0] // 16, shape[1] // 16)) < 0.4
    tiles[0, 0] = True
    return np.kron(tiles, np.ones((16, 16), bool))
  if kind == 'rows':
    mask[draw.permutation(shape[0])[:5]] = True
  elif kind == 'columns':
    mask[:, draw.permutation(shape[1])[:5]] = True
  elif kind == 'one weight':
    mask[3, 7] = True
  elif kind != 'nothing':
    n, m = map(int, kind.split(':'))
    ranks = draw.random((shape[0] // m, m, shape[1])).argsort(axis=1)
    mask = (ranks < n).reshape(shape)
  return mask


cases = given(
  seed=st.integers(0, 2**31), shape=st.sampled_from(SHAPES), kind=st.sampled_from(KINDS)
)


@pytest.mark.parametrize('name', formats.names())
@settings(max_examples=12, deadline=None)
@cases
def test_a_format_stores_the_masked_kernel(name, seed, shape, kind):
  draw = np.random.default_rng(seed)
  mask, cls = mask_of(kind, shape, draw), formats.load(name)
  if cls.refuses(mask):
    return
  kernel = draw.normal(size=shape).astype('f')
  stored = cls.pack(kernel, mask)
  assert stored.shape == shape
  assert_array_equal(np.asarray(stored.kernel()), np.where(mask, kernel, 0))


@pytest.mark.parametrize('name', RUNNING)
@settings(max_examples=8, deadline=None)
@cases
def test_products_are_those_of_the_masked_kernel(name, seed, shape, kind):
  draw = np.random.default_rng(seed)
  mask, cls = mask_of(kind, shape, draw), formats.load(name)
  if cls.refuses(mask):
    return
  kernel, x = draw.normal(size=shape).astype('f'), draw.normal(size=(2, 3, shape[0])).astype('f')
  stored = jax.device_put(cls.pack(kernel, mask))
  want = x.astype('d') @ np.where(mask, kernel, 0)
  assert_allclose(stored.matmul(x), want, rtol=1e-5, atol=1e-5)
  # One token, some of its inputs, some of its outputs.
  assert_allclose(stored.matmul(x[0, 0]), want[0, 0], rtol=1e-5, atol=1e-5)
  outputs = np.sort(draw.permutation(shape[1])[:4])
  assert_allclose(stored.of_outputs(x[0, 0], outputs), want[0, 0][outputs], rtol=1e-5, atol=1e-5)
  if cls.selects != -2:
    return
  for count in (4, 32):
    inputs = np.sort(draw.permutation(shape[0])[:count])
    some = x[0, 0][inputs].astype('d') @ np.where(mask, kernel, 0)[inputs]
    assert_allclose(stored.of_inputs(x[0, 0][inputs], inputs), some, rtol=1e-5, atol=1e-5)


def test_on_a_gpu_many_rows_are_multiplied_with_tiles_in_their_places(monkeypatch):
  draw, shape = np.random.default_rng(3), (64, 48)
  mask = mask_of('tiles', shape, draw)
  kernel, x = draw.normal(size=shape).astype('f'), draw.normal(size=(200, 64)).astype('f')
  stored = jax.device_put(formats.load('block').pack(kernel, mask))

  def flops(x):
    return executed.count(jax.make_jaxpr(lambda x: stored.matmul(x))(x).jaxpr).flops

  assert flops(x) == 2 * 200 * stored.tiles.size
  monkeypatch.setattr(device, 'compute_capability', lambda: (9, 0))
  assert (flops(x), flops(x[:1])) == (2 * 200 * kernel.size, 2 * stored.tiles.size)
  assert_allclose(stored.matmul(x), x.astype('d') @ np.where(mask, kernel, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['gather', 'dense_out_in'])
def test_rows_in_bfloat16_add_up_in_float32(name):
  draw = np.random.default_rng(0)
  kernel, x = draw.random((512, 8)).astype(jnp.bfloat16), draw.random(512).astype(jnp.bfloat16)
  stored = jax.device_put(formats.load(name).pack(kernel, np.ones(kernel.shape, bool)))
  found = (
    stored.of_inputs(x, np.arange(512)) if name == 'gather' else stored.of_outputs(x, np.arange(8))
  )
  assert found.dtype == jnp.bfloat16
  assert_allclose(np.asarray(found).astype('d'), x.astype('d') @ kernel.astype('d'), rtol=2**-8)


@pytest.mark.parametrize('rows', [1, 3])
def test_experts_apart_multiply_as_a_stack(rows):
  draw = np.random.default_rng(0)
  kernel, mask = draw.normal(size=(3, 32, 16)).astype('f'), draw.random((3, 32, 16)) < 0.5
  stored = jax.device_put(formats.load('unstacked_experts').pack(kernel, mask))
  assert_array_equal(stored.kernel(), kernel * mask)
  x = draw.normal(size=(rows, 32)).astype('f')
  for expert, one in enumerate(kernel * mask):
    assert_allclose(stored.of_expert(x, expert), x.astype('d') @ one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('shape', 'names'),
  [((64, 256), ['dense_in_out', 'dense_in_out']), ((768, 3072), ['block', 'gather'])],
)
def test_small_matrices_run_dense_where_large_ones_run_packed(shape, names, monkeypatch):
  # On one device, wherever the test runs: other devices have other costs.
  monkeypatch.setattr(costs, 'current', lambda: costs.read(costs.FALLBACK))
  kernel = np.random.default_rng(0).normal(size=shape).astype('f')
  tiles = np.zeros((shape[0] // 32, shape[1] // 32), bool)
  tiles.flat[::10] = True
  cases = (np.kron(tiles, np.ones((32, 32), bool)), {}), (np.ones(shape, bool), {-2: 0.1})
  chosen = [choose('kernel', Kernel(kernel, mask, kernel.nbytes), read) for mask, read in cases]
  assert [formats.name_of(matrix.runs) for matrix in chosen] == names


def test_formats_accept_the_masks_that_suit_them():
  draw = np.random.default_rng(0)
  taken = {
    name: {k for k in KINDS if not formats.load(name).refuses(mask_of(k, (64, 48), draw))}
    for name in formats.names()
  }
  assert taken['dense_out_in'] == taken['gather'] == set(KINDS)
  assert taken['dense_in_out'] == set()  # neither few inputs nor many outputs
  assert taken['block'] >= {'tiles', 'one weight', 'nothing'}
  assert taken['block'].isdisjoint({'full', 'weights', '2:4', '1:8'})
  assert taken['channels'] >= {'rows', 'columns', 'one weight'}
  assert taken['channels'].isdisjoint({'full', 'weights', '2:4', '1:8'})
  assert taken['bitmask'] == set(KINDS) - {'full'}
  assert taken['n_of_m'] == {'2:4', '1:8'}


@pytest.mark.parametrize('name', formats.names())
def test_stacked_kernels_are_refused_but_by_formats_made_for_them(name):
  stacked = np.ones((3, 32, 32), bool)
  stacked[1] = False
  assert bool(formats.load(name).refuses(stacked)) == (name not in ('unstacked_experts', 'bitmask'))


def test_a_block_that_no_tile_divides_is_refused_with_the_shape():
  assert '(24, 40)' in formats.load('block').refuses(np.zeros((24, 40), bool))


def test_bytes_are_counted_to_the_index():
  draw = np.random.default_rng(0)
  shape = (64, 48)
  kernel = draw.normal(size=shape).astype('f')

  def nbytes(name, mask):
    return formats.load(name).pack(kernel, mask).nbytes

  assert nbytes('dense_out_in', np.ones(shape, bool)) == 64 * 48 * 4
  weights = mask_of('weights', shape, draw)
  assert nbytes('bitmask', weights) == weights.sum() * 4 + 64 * 48 // 8
  # 2 of 4: half the values, and two bits for each of them.
  assert nbytes('n_of_m', mask_of('2:4', shape, draw)) == 64 * 48 // 2 * 4 + 64 * 48 // 2 * 2 // 8
  assert nbytes('n_of_m', mask_of('1:8', shape, draw)) == 64 * 48 // 8 * 4 + 64 * 48 // 8 * 3 // 8
  # Four inputs and all outputs: weights, their places, and a place for each output.
  rows = np.zeros(shape, bool)
  rows[[1, 5, 8, 40]] = True
  assert nbytes('channels', rows) == 4 * 48 * 4 + 4 * 4 + 48 * 4
  # A tile of 16: its weights, its source, and its place among three groups of outputs.
  tile = np.zeros(shape, bool)
  tile[16:32, 32:48] = True
  assert nbytes('block', tile) == 256 * 4 + 4 + 3 * 4
