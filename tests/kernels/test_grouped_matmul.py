"""Products of blocks with matrices of a stack, against a loop over blocks."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.kernels.grouped_matmul import (
  copied_flops,
  gather_groups,
  grouped_matmul,
  one_by_one,
  selection_flops,
)
from sparse_lm.plan import executed

N, P, I, F, E = 5, 3, 4, 6, 3
run = jax.jit(grouped_matmul)


def drawn(seed, rows=P, blocks=N):
  """Rows, matrices, and the group of each block, of which E is none."""
  draw = np.random.default_rng(seed)
  x, kernel = draw.normal(size=(blocks, rows, I)), draw.normal(size=(E, I, F))
  return x.astype('f'), kernel.astype('f'), draw.integers(0, E + 1, blocks).astype('i')


def by_loop(x, kernel, group):
  out = np.zeros((*x.shape[:2], F))
  for n, g in enumerate(group):
    if g < E:
      out[n] = x[n].astype(np.float64) @ kernel[g]
  return out


@given(st.integers(0, 2**31), st.sampled_from([1, P]))
@settings(deadline=None, max_examples=20)
def test_each_block_is_multiplied_with_the_matrix_of_its_group(seed, rows):
  x, kernel, group = drawn(seed, rows)
  assert_allclose(run(x, kernel, group), by_loop(x, kernel, group), rtol=1e-4, atol=1e-5)
  assert_allclose(run(x[:E], kernel), by_loop(x[:E], kernel, range(E)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('rows', [1, P])
def test_groups_one_after_the_other_give_the_same(rows):
  x, kernel, group = drawn(1, rows)
  of_group = lambda x, g: x @ kernel[g]  # noqa: E731
  for blocks, groups in ((x, group), (x[:E], None)):
    want = by_loop(blocks, kernel, range(E) if groups is None else groups)
    assert_allclose(one_by_one(of_group, E, blocks, groups), want, rtol=1e-4, atol=1e-5)


def test_many_blocks_of_many_groups_are_a_loop_whose_branches_are_compiled_once():
  x, kernel, group = drawn(4, 1, blocks=100)
  traced = jax.make_jaxpr(grouped_matmul)(x, kernel, group).jaxpr
  assert [str(traced).count(f'{name}[') for name in ('cond', 'scan')] == [1, 1]
  assert executed.count(traced).flops == 2 * 100 * I * F
  assert_allclose(run(x, kernel, group), by_loop(x, kernel, group), rtol=1e-4, atol=1e-5)


def test_a_block_gets_the_part_of_its_group_and_zeros_where_it_has_none():
  _, kernel, _ = drawn(2)
  found = gather_groups(kernel, np.array([2, E, 0]))
  assert_allclose(found, np.stack([kernel[2], np.zeros((I, F)), kernel[0]]), rtol=1e-6)
  assert_array_equal(gather_groups(kernel, None), kernel)


@pytest.mark.parametrize('rows', [1, P])
@pytest.mark.parametrize('grouped', [True, False])
def test_flops_beside_the_rows_are_those_of_the_traced_program(rows, grouped):
  x, kernel, group = drawn(3, rows, N if grouped else E)
  groups = group if grouped else None
  jaxpr = jax.make_jaxpr(lambda x: grouped_matmul(x, kernel, groups))(x).jaxpr
  products = 2 * len(x) * rows * I * F
  assert executed.count(jaxpr).flops == products + copied_flops(x, kernel, groups)
  jaxpr = jax.make_jaxpr(lambda kernel: gather_groups(kernel, groups))(kernel).jaxpr
  assert executed.count(jaxpr).flops == selection_flops(kernel, groups)
  assert (copied_flops(x, kernel, groups) > 0) == (grouped and rows > 1)


def test_a_matrix_is_multiplied_in_the_dtype_of_the_rows():
  x, kernel, group = drawn(4)
  for groups, blocks in ((group, x), (None, x[:E]), (group, x[:, :1])):
    half = run(blocks.astype(jax.numpy.bfloat16), kernel, groups)
    assert half.dtype == jax.numpy.bfloat16
    want = by_loop(blocks, kernel, range(E) if groups is None else groups)
    assert_allclose(half.astype(np.float32), want, rtol=0.05, atol=0.1)
