"""cuDNN's fused attention: when it runs and with which arguments; the einsums' softmax in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.kernels import attention as kernel
from sparse_lm.kernels import device
from sparse_lm.kernels.attention import (
  Blocks,
  Documents,
  KeyValues,
  Mask,
  attention,
  mask_array,
  softmax,
  why_unfused,
)

B, S, H, G, K = 2, 12, 4, 2, 8
WINDOWS = [None, 1, 3, S, 2**31 - 1]
FORWARD, BACKWARD = '@__cudnn$fmhaSoftmax(', '@__cudnn$fmhaSoftmaxBackward('


def drawn(dtype='float32', groups=G, width=K, whole=True, length=S):
  """Queries `[B, L, H, K]`, their positions, and the keys of whole sequences."""
  draw = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(draw.normal(size=(B, length, heads, width)), dtype) for heads in (H, groups, groups)
  )
  places = np.broadcast_to(np.arange(length, dtype='i'), (B, length))
  return q, places, KeyValues(k, v, places, np.ones((B, length), bool), whole=whole)


@pytest.mark.parametrize('window, groups', [*((w, G) for w in WINDOWS), (None, 1), (3, H)])
def test_the_fused_kernel_is_told_what_the_mask_means(window, groups):
  """By JAX's own reference of these arguments; cuDNN itself runs on a GPU alone."""
  q, places, keys = drawn(groups=groups)
  mask = Mask(window=window)
  value = functools.partial(kernel._fused, q, keys, mask, 'xla')
  assert_allclose(value(), attention(q, places, keys, mask), atol=1e-6)


@pytest.mark.parametrize(
  'static', [{}, {'causal': False}, {'window': 3}, {'window': 2, 'sinks': 2}]
)
def test_whole_sequences_have_the_mask_of_one(static):
  _, places, keys = drawn()
  found = mask_array(Mask(**static), places, keys)
  assert found.shape == (1, 1, 1, S, S)
  want = mask_array(Mask(**static), places, keys.replace(whole=False))
  assert_array_equal(np.broadcast_to(found, want.shape), want)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_softmax_of_rounded_scores_and_its_gradient_are_those_of_float64(dtype):
  draw = np.random.default_rng(1)
  scores, upstream = (jnp.asarray(draw.normal(size=(3, 16)), dtype) for _ in 'ab')
  reads = draw.random((3, 16)) < 0.7
  weights, pull_back = jax.vjp(lambda s: softmax(s, reads), scores)
  (gradient,) = pull_back(upstream)
  assert weights.dtype == gradient.dtype == dtype
  exact, g = (np.asarray(a, np.float64) for a in (scores, upstream))
  want = np.where(reads, np.exp(exact), 0)
  want /= want.sum(-1, keepdims=True)
  assert_allclose(np.asarray(weights, np.float64), want, rtol=2**-8, atol=1e-7)
  want_gradient = want * (g - (want * g).sum(-1, keepdims=True))
  assert_allclose(np.asarray(gradient, np.float64), want_gradient, atol=4e-3)
  assert not np.asarray(gradient)[~reads].any()


def test_a_query_without_keys_gives_no_gradient_in_bfloat16():
  scores = jnp.asarray([[1.0, 2.0, 3.0]], jnp.bfloat16)
  weight = lambda s: softmax(s, jnp.zeros((1, 3), bool))[0, 0].astype(jnp.float32)  # noqa: E731
  assert weight(scores) == pytest.approx(1 / 3, rel=2**-8)
  assert not np.asarray(jax.grad(weight)(scores), np.float32).any()


CALLS = {
  'dropout': ('acts on the attention weights', {'on_weights': lambda weights: weights}, {}, {}),
  'selects': ('by their scores', {'select': lambda scores, reads: reads}, {}, {}),
  'sinks': ('another mask', {}, {'window': 2, 'sinks': 1}, {}),
  'later keys': ('another mask', {}, {'causal': False}, {}),
  'blocks': ('another mask', {}, {'blocks': Blocks(np.ones((B, 1, 1, S, 1), bool), S)}, {}),
  'documents': ('another mask', {}, {'documents': Documents(*np.zeros((2, B, S), 'i'))}, {}),
  'not whole': ('tokens are left out', {}, {}, {'whole': False}),
  'float32': ('config.model.precision is float32', {}, {}, {'dtype': 'float32'}),
  'odd width': ('8, 16, 24, ... 128, but these have width 12', {}, {}, {'width': 12}),
  'odd length': ('an even number of tokens, but config.data.context is 11', {}, {}, {'length': 11}),
  'wide': ('8, 16, 24, ... 128, but these have width 136', {}, {}, {'width': 136}),
}


@pytest.mark.parametrize('name', CALLS)
def test_what_the_fused_kernel_cannot_do_runs_as_einsums(name, on_nvidia):
  reason, more, mask, arrays = CALLS[name]
  q, places, keys = drawn(**{'dtype': 'bfloat16', **arrays})
  assert reason in why_unfused(q, places, keys, Mask(**mask), **more)
  on_nvidia(9, 0)
  with kernel.collect_fused_refusals() as found:
    # On a CPU cuDNN's call could not be run.
    attention(q, places, keys, Mask(**mask), **more, kernel='cudnn')
  assert len(found) == 1 and reason in found[0]


def test_other_positions_may_say_anything():
  q, places, keys = drawn('bfloat16')
  assert not why_unfused(q, places, keys, Mask())
  assert 'tokens are left out' in why_unfused(q, places + 1, keys, Mask())


def lowered(choice, batched=False):
  """The StableHLO of attention and its gradient, for CUDA."""
  q, places, keys = drawn('bfloat16')

  def value(q, k, v):
    own = KeyValues(k, v, places, np.ones((B, S), bool), whole=True)
    out = attention(q, places, own, Mask(window=3), kernel=choice)
    return jnp.sum((out * q).astype('float32'))

  run, arrays = jax.grad(value, (0, 1, 2)), (q, keys.k, keys.v)
  if batched:
    run, arrays = jax.vmap(run), [jnp.stack([a] * 3) for a in arrays]
  return jax.jit(run).trace(*arrays).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('choice', ['auto', 'cudnn', 'einsum'])
def test_a_gpu_with_the_fused_kernel_runs_it_forward_and_backward(choice, on_nvidia):
  on_nvidia(9, 0)
  text = lowered(choice)
  assert (FORWARD in text, BACKWARD in text) == (choice != 'einsum',) * 2
  assert ('sliding_window_length\\22: 3' in text) == (choice != 'einsum')
  assert ('dot_general' in text) == (choice == 'einsum')


def test_several_runs_side_by_side_share_a_call_of_the_fused_kernel(on_nvidia):
  on_nvidia(9, 0)
  text = lowered('auto', batched=True)
  assert text.count(FORWARD) == text.count(BACKWARD) == 1 and 'dot_general' not in text


def test_a_gpu_without_the_fused_kernel_runs_einsums(on_nvidia):
  on_nvidia(7, 5)
  assert '__cudnn' not in lowered('auto')


def test_what_a_device_can_run(on_nvidia):
  assert device.compute_capability() is None and not device.has_fast_bfloat16()
  for capability, version, fast, fused in (
    ((9, 0), 91000, True, True),
    ((8, 0), 91000, True, True),
    ((7, 5), 91000, False, False),
    ((10, 3), 91000, True, False),  # needs a later cuDNN, as JAX knows
    ((10, 3), 91100, True, True),
  ):
    on_nvidia(*capability, version=version)
    jax.clear_caches()  # JAX asks the device once for each shape
    found = device.has_fast_bfloat16(), device.is_old_gpu(), device.has_fused_attention()
    assert found == (fast, not fast, fused), capability
  assert device.name().endswith('(compute capability 10.3)')


def test_only_a_gpu_has_compiler_options(on_nvidia):
  assert device.compiler_options() is None
  on_nvidia(9, 0)
  # An option that XLA did not know would be refused here, too.
  add = jax.jit(lambda x: x + 1, compiler_options=device.compiler_options())
  assert device.compiler_options() and add(1.0) == 2
