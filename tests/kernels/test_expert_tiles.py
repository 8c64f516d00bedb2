"""The kernels of grouped products on a GPU, run as programs of JAX, against loops over blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from sparse_lm.kernels import expert_tiles, grouped_matmul
from sparse_lm.plan import executed

E = 4
GROUPS = {'each': [0, 1, 2, 3], 'some': [0, 0, 2, 4, 4], 'one': [3, 3], 'none': [4, 4]}


def drawn(groups, rows, inputs, outputs, dtype='f'):
  draw = np.random.default_rng(len(groups))
  shapes = (len(groups), rows, inputs), (E, inputs, outputs), (len(groups), rows, outputs)
  return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def by_loop(x, kernel, group):
  own = [
    x_PxI @ kernel[g] if g < E else np.zeros((len(x_PxI), kernel.shape[2]))
    for x_PxI, g in zip(x, group)
  ]
  return np.stack(own)


def sums_by_loop(x, y, group):
  out = np.zeros((E, x.shape[2], y.shape[2]))
  for x_PxI, y_PxF, g in zip(x, y, group):
    if g < E:
      out[g] += x_PxI.T @ y_PxF
  return out


@pytest.mark.parametrize('which', GROUPS)
@pytest.mark.parametrize(
  'sizes',
  [(16, 32, 48), *(pytest.param(s, marks=pytest.mark.slow) for s in [(48, 16, 64), (256, 32, 16)])],
)
def test_tiles_add_up_to_products_of_blocks_and_to_sums_over_groups(which, sizes):
  group = np.array(GROUPS[which], 'i')
  x, kernel, y = drawn(group, *sizes)
  exact = [np.asarray(a, 'd') for a in (x, kernel, y)]
  want = by_loop(exact[0], exact[1], group)
  back = by_loop(exact[2], exact[1].swapaxes(1, 2), group)
  total = sums_by_loop(exact[0], exact[2], group)
  close = functools.partial(assert_allclose, rtol=1e-5, atol=1e-4)
  close(expert_tiles.rows_in_tiles(x, kernel, group, False, interpret=True), want)
  close(expert_tiles.rows_in_tiles(y, kernel, group, True, interpret=True), back)
  close(expert_tiles.matrices_in_tiles(x, y, group, E, interpret=True), total)
  # The loops of other devices, and the gradients that are made of them.
  found, pullback = jax.vjp(lambda x, kernel: expert_tiles.product(x, kernel, group), x, kernel)
  close(found, want)
  to_x, to_kernel = pullback(y)
  close(to_x, back)
  close(to_kernel, total)


def test_products_of_bfloat16_are_summed_in_float32():
  group = np.array(GROUPS['some'], 'i')
  x, kernel, y = drawn(group, 16, 128, 16, 'bfloat16')
  exact = [np.asarray(a, 'd') for a in (x, kernel, y)]
  rows = expert_tiles.rows_in_tiles(x, kernel, group, False, interpret=True)
  sums = expert_tiles.matrices_in_tiles(x, y, group, E, interpret=True)
  assert rows.dtype == sums.dtype == jnp.bfloat16
  assert_allclose(np.asarray(rows, 'd'), by_loop(exact[0], exact[1], group), rtol=2**-8, atol=1e-3)
  assert_allclose(
    np.asarray(sums, 'd'), sums_by_loop(exact[0], exact[2], group), rtol=2**-8, atol=1e-3
  )


def test_sizes_that_tiles_do_not_divide_or_int32_cannot_index_are_not_supported():
  assert expert_tiles.fits(128, (8, 768, 3072), 136)
  assert not expert_tiles.fits(128, (8, 768, 3070), 136)
  assert not expert_tiles.fits(8, (8, 768, 3072), 136)
  assert not expert_tiles.fits(128, (1024, 768, 3072), 136)


@pytest.fixture
def on_gpu(monkeypatch):
  monkeypatch.setattr(grouped_matmul, 'has_tiles', lambda: True)


@pytest.mark.parametrize('rows', [1, 32])
def test_on_a_gpu_a_grouped_matmul_copies_no_matrix_forward_or_backward(rows, on_gpu):
  group = np.array(GROUPS['some'], 'i')
  x, kernel, y = drawn(group, rows, 32, 48, 'bfloat16')

  def step(x, kernel, y):
    found, pullback = jax.vjp(lambda *a: grouped_matmul.grouped_matmul(*a, group), x, kernel)
    return found, pullback(y)

  text = jax.jit(step).trace(x, kernel, y).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('xla.gpu.triton') == 3 and 'stablehlo.dot_general' not in text
  exact = [np.asarray(a, 'd') for a in (x, kernel)]
  assert_allclose(
    np.asarray(step(x, kernel, y)[0], 'd'), by_loop(*exact, group), rtol=2**-7, atol=0.05
  )
  # Each of the three products counts once, and the rows that fill a tile beside those that are there.
  jaxpr = jax.make_jaxpr(lambda *a: grouped_matmul.grouped_matmul(*a, group))(x, kernel).jaxpr
  beside = grouped_matmul.copied_flops(x, kernel, group)
  assert executed.count(jaxpr).flops == 2 * x.size * 48 + beside
  assert (beside > 0) == (rows == 1)


@pytest.mark.parametrize(
  ('tiles', 'width', 'rows'), [(False, 64, 64), (True, 64, 128), (True, 60, 64)]
)
def test_blocks_are_as_large_as_the_device_multiplies_them_best(tiles, width, rows, monkeypatch):
  monkeypatch.setattr(grouped_matmul, 'has_tiles', lambda: tiles)
  assert grouped_matmul.block_rows((E, width, 256)) == rows
