"""Selection on devices other than a CPU: called directly, and lowered for a GPU."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.kernels import radix
from sparse_lm.kernels.topk import counts, topk_mask, topk_masks, topk_rows

# Few values, so that most selections have to break ties; denormals and zeros of both signs among them.
VALUES = [-np.inf, -3e38, -2.0, -1e-40, -0.0, 0.0, 1e-45, 1e-40, 0.5, 0.50000006, 3e38, np.inf]
SHAPES = [(1,), (7,), (40,), (1, 9), (5, 8), (8, 5), (2, 65), (3, 4, 4)]
MASKS, ROWS = jax.jit(radix.masks), jax.jit(radix.rows)


def oracle(scores, k):
  """Stable sort of the negated scores of one matrix: the largest first, ties in flat order."""
  flat = np.asarray(scores, np.float32).ravel() + np.float32(
    0
  )  # which makes -0.0 a zero like others
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(-flat, kind='stable')[:k]] = True
  return mask.reshape(np.shape(scores))


def drawn(draw, shape, ties):
  return (draw.choice(VALUES, shape) if ties else draw.standard_normal(shape)).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
  seed=st.integers(0, 2**31),
  shapes=st.sampled_from([SHAPES, SHAPES[::-1], [(5, 8), (8, 5), (5, 8)]]),
  ties=st.booleans(),
)
def test_masks_of_several_arrays_equal_sorting_each_matrix(seed, shapes, ties):
  draw = np.random.default_rng(seed)
  scores = [drawn(draw, shape, ties) for shape in shapes]
  k = [draw.integers(0, math.prod(s[-2:]) + 1, s[:-2]).astype(np.int32) for s in shapes]
  for mask, score, count in zip(MASKS(scores, k), scores, k):
    matrices = zip(score, count) if score.ndim > 2 else [(score, count)]
    wanted = np.reshape([oracle(*matrix) for matrix in matrices], score.shape)
    np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('value', [-np.inf, -0.0, 1.0, np.inf])
def test_none_and_all(shape, value):
  scores, size = np.full(shape, value, np.float32), math.prod(shape[-2:])
  for k in (0, size):
    (mask,) = MASKS([scores], [np.full(shape[:-2], k, np.int32)])
    assert mask.sum() == k * scores.size // size


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('shape', [(6, 40), (2, 3, 65), (4, 1)])
@pytest.mark.parametrize('ties', [False, True])
def test_rows_equal_sorting_each(dtype, shape, ties):
  scores = jnp.asarray(drawn(np.random.default_rng(0), shape, ties)).astype(dtype)
  for k in sorted({1, (shape[-1] + 1) // 3, shape[-1]} - {0}):
    wanted = [oracle(row, k) for row in np.asarray(scores, np.float32).reshape(-1, shape[-1])]
    np.testing.assert_array_equal(ROWS(scores, np.int32(k)), np.reshape(wanted, shape))


@pytest.mark.parametrize('ties', [False, True])
def test_matrices_of_several_chunks(ties):
  draw = np.random.default_rng(1)
  scores = [drawn(draw, (200, 401), ties) for _ in range(2)]
  assert scores[0].size > 4 * radix.CHUNK and scores[0].size % radix.CHUNK
  for share in (0.0, 0.1, 0.93, 1.0):
    k = round(scores[0].size * share)
    for mask, score in zip(MASKS(scores, [np.int32(k)] * 2), scores):
      np.testing.assert_array_equal(mask, oracle(score, k))


def test_an_array_may_have_more_keys_than_chunks_of_them_squared():
  keys = jax.ShapeDtypeStruct((1, 2**29 + 1), jnp.int32)
  found = jax.eval_shape(radix.cutoffs, keys, jax.ShapeDtypeStruct((1,), jnp.int32))
  assert [array.shape for array in found] == [(1,), (1,)]


@pytest.mark.parametrize('ties', [False, True])
def test_runs_of_different_densities_are_vmapped(ties):
  scores = drawn(np.random.default_rng(2), (4, 5, 8), ties)
  for mask, score, k in zip(jax.vmap(topk_mask)(scores, np.arange(4) * 9), scores, range(0, 36, 9)):
    np.testing.assert_array_equal(mask, oracle(score, k))
  found = jax.jit(jax.vmap(lambda s, k: radix.masks([s, s.T], [k, 40 - k])))(
    scores, np.arange(4) * 9
  )
  for i, k in enumerate(range(0, 36, 9)):
    np.testing.assert_array_equal(found[0][i], oracle(scores[i], k))
    np.testing.assert_array_equal(found[1][i], oracle(scores[i].T, 40 - k))


def test_counts_of_several_arrays():
  flags = [np.random.default_rng(3).random(shape) < 0.5 for shape in SHAPES]
  for function in (counts, radix.counts, jax.jit(radix.counts)):
    assert [int(count) for count in function(flags)] == [flag.sum() for flag in flags]


def lowered(platform, f, *arguments):
  return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_a_gpu_searches_all_matrices_of_a_size_in_the_same_passes():
  scores = [np.zeros(shape, np.float32) for shape in ((8, 8), (4, 16), (8, 16), (16, 8))]
  for times in (1, 4):
    several = scores * times
    text = lowered('cuda', topk_masks, several, [np.int32(3)] * len(several))
    # Of sizes 64 and 128 each: upper halves, lower halves, and the index of the last tie.
    assert text.count('stablehlo.while') == 2 * 3
    assert passes(text) == [3, 4, 8, 8, 8, 8]
    # A condition would wait for the host. Two that choose the platform are resolved in compiling.
    assert text.count('stablehlo.case') <= 2 and 'stablehlo.if' not in text
  assert lowered('cpu', topk_masks, scores, [np.int32(3)] * 4).count('stablehlo.while') >= 4


def test_a_gpu_searches_rows_of_16_bits_in_half_the_passes():
  for dtype, searched in ((jnp.bfloat16, [3, 8]), (jnp.float32, [3, 8, 8])):
    text = lowered('cuda', lambda scores: topk_rows(scores, 5), jnp.zeros((6, 40), dtype))
    assert passes(text) == searched


def passes(text):
  """How often each loop runs, of those that count their passes to a constant."""
  return sorted(
    int(n) for n in re.findall(r'cond \{\s+%\S+ = stablehlo.constant dense<(\d+)>', text)
  )
