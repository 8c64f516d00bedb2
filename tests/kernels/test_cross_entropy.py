"""Cross-entropy in chunks beside NumPy in float64 and beside the logits of all tokens at once."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sparse_lm.kernels import cross_entropy as kernel
from sparse_lm.kernels.cross_entropy import Head, Readout, cross_entropy


def chunks_of(rows, vocab):
  """Inside of it chunks have so many rows at most."""
  return mock.patch.object(kernel, 'LOGITS_BYTES_ON_CPU', 4 * rows * vocab)


def drawn(seed, shape, vocab, bias, bigrams, tied=False, dtype=np.float32):
  """What some logits are computed from."""
  draw = np.random.default_rng(seed)
  kernel_DxV = draw.normal(size=(shape[2], vocab)).astype('f')
  head = Head(
    None if tied else kernel_DxV,
    kernel_DxV.T if tied else None,
    draw.normal(size=vocab).astype('f') if bias else None,
    draw.normal(size=(vocab, vocab)).astype('f') if bigrams else None,
  )
  tokens = draw.integers(0, vocab, shape[:2]).astype('i') if bigrams else None
  return jax.tree.map(jnp.asarray, Readout(draw.normal(size=shape).astype(dtype), head, tokens))


def float64(head):
  """The kernel, the bias and the bigrams; `None` for those that there are not."""
  kernel_DxV, table_VxD, *rest = jax.tree.map(lambda a: np.asarray(a, np.float64), head)
  return kernel_DxV if table_VxD is None else table_VxD.T, *rest


def log_softmax(logits):
  top = logits - logits.max(-1, keepdims=True)
  return top - np.log(np.exp(top).sum(-1, keepdims=True))


def exact_logits(own):
  """float64 `[T, V]`."""
  hidden = np.asarray(own.hidden_BxLxD, np.float64).reshape(-1, own.hidden_BxLxD.shape[-1])
  kernel_DxV, bias_V, bigrams_VxV = float64(own.head)
  logits = hidden @ kernel_DxV
  if bias_V is not None:
    logits += bias_V
  if bigrams_VxV is not None:
    logits += bigrams_VxV[np.asarray(own.tokens_BxL).reshape(-1)]
  return logits


def exact(own, targets, teacher, weights, temperature):
  """The loss, the losses of each token, and the gradients, by their formulas in float64."""
  logits, count = exact_logits(own), targets.size
  nats = -log_softmax(logits)[range(count), targets.reshape(-1)]
  loss, divergence = weights[0] * nats.mean(), None
  slope = weights[0] * (np.exp(log_softmax(logits)) - np.eye(logits.shape[1])[targets.reshape(-1)])
  if teacher is not None:
    ours, theirs = (log_softmax(x / temperature) for x in (logits, exact_logits(teacher)))
    divergence = temperature**2 * (np.exp(theirs) * (theirs - ours)).sum(-1)
    loss += weights[1] * divergence.mean()
    slope += weights[1] * temperature * (np.exp(ours) - np.exp(theirs))
  slope /= count
  hidden = np.asarray(own.hidden_BxLxD, np.float64).reshape(count, -1)
  gradients = [slope @ float64(own.head)[0].T, hidden.T @ slope]
  if own.head.table_VxD is not None:
    gradients[1] = gradients[1].T
  if own.head.bias_V is not None:
    gradients.append(slope.sum(0))
  if own.head.bigrams_VxV is not None:
    rows = np.zeros(own.head.bigrams_VxV.shape)
    np.add.at(rows, np.asarray(own.tokens_BxL).reshape(-1), slope)
    gradients.append(rows)
  return loss, [nats, divergence], gradients


def with_gradients(own, targets, teacher, weights, temperature, plain=False):
  """The loss, the losses of each token, and the gradients of hidden states and head; compiled."""

  def loss(hidden, head, weights):
    read = Readout(hidden, head, own.tokens_BxL)
    read = kernel.all_logits(read) if plain else read
    value, losses = cross_entropy(read, targets, teacher, weights, temperature)
    return 8 * value, losses

  found = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  (value, losses), gradients = found(own.hidden_BxLxD, own.head, weights)
  return value / 8, losses, jax.tree.map(lambda a: a / 8, gradients)


def near(got, want, tolerance):
  """Equal but for a part of the largest entry."""
  want = np.asarray(want, np.float64)
  atol = tolerance * max(np.abs(want).max(), 1)
  got = np.asarray(got, np.float64).reshape(want.shape)
  assert_allclose(got, want, rtol=0, atol=atol)


@st.composite
def cases(draw):
  """A model's side, targets, a teacher or none, weights, temperature, and rows of a chunk."""
  shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4)))
  vocab, seed = draw(st.integers(2, 9)), draw(st.integers(0, 2**31))
  own = drawn(seed, shape, vocab, *(draw(st.booleans()) for _ in range(3)))
  teacher = None
  if draw(st.booleans()):
    teacher = drawn(
      seed + 1, (*shape[:2], draw(st.integers(1, 4))), vocab, False, True, draw(st.booleans())
    )
  targets = np.random.default_rng(seed).integers(0, vocab, shape[:2]).astype('i')
  weights = draw(st.floats(0, 2)), draw(st.floats(0, 2))
  temperature = draw(st.sampled_from([0.5, 1.0, 3.0]))
  return own, targets, teacher, weights, temperature, draw(st.integers(1, targets.size))


@given(cases())
@settings(deadline=None, max_examples=15, derandomize=True)
def test_losses_and_gradients_are_those_of_all_logits_at_once(case):
  *given_, rows = case
  own, teacher = given_[0], given_[2]
  with chunks_of(rows, float64(own.head)[0].shape[1]):
    value, losses, (hidden, head, of_weights) = with_gradients(*given_)
  want, want_losses, want_gradients = exact(*given_)
  near(value, want, 1e-6)
  near(losses.nats, want_losses[0], 2e-6)
  for got, expected in zip([hidden, *jax.tree.leaves(head)], want_gradients, strict=True):
    near(got, expected, 1e-6)
  near(of_weights[0], want_losses[0].mean(), 1e-6)
  if teacher is None:
    assert losses.divergence is None
  else:
    near(losses.divergence, want_losses[1], 4e-6)
    near(of_weights[1], want_losses[1].mean(), 2e-6)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 100))
@settings(deadline=None, max_examples=100)
def test_chunks_stay_below_the_limit_and_are_not_many_more_than_needed(tokens, vocab, most):
  with chunks_of(most, vocab):
    rows = kernel.chunk_rows(tokens, vocab)
  needed = -(-tokens // most)
  assert 1 <= rows <= most and -(-tokens // rows) < 2 * needed
  assert tokens % rows == 0 or not any(tokens % n == 0 for n in range(needed, 2 * needed))


def test_large_vocabularies_fill_a_gpus_matmuls_and_small_models_need_no_loop(monkeypatch):
  assert kernel.chunk_rows(3, 2**40) == 1
  assert kernel.chunk_rows(2048, 8192) == 256  # 8 MB
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert kernel.chunk_rows(16 * 1024, 50_304) == 4096
  assert kernel.chunk_rows(64 * 256, 65) == 64 * 256


def test_bfloat16_is_rounded_in_products_and_not_in_sums():
  own = drawn(0, (2, 64, 32), 50, True, True, dtype=jnp.bfloat16)
  rounded = np.asarray(own.head.kernel_DxV.astype(jnp.bfloat16), 'f')
  own = own._replace(head=own.head._replace(kernel_DxV=rounded))
  targets = np.random.default_rng(1).integers(0, 50, (2, 64)).astype('i')
  given_ = own, targets, None, (1.0, 0.0), 1.0
  with chunks_of(16, 50):
    value, losses, (hidden, head, _) = with_gradients(*given_)
    jaxpr = jax.make_jaxpr(functools.partial(with_gradients, *given_))()
  want, (nats, _), gradients = exact(*given_)
  logit = np.abs(exact_logits(own)).max()
  near(value, want, 2**-9)
  assert_allclose(losses.nats.reshape(-1), nats, rtol=0, atol=2**-8 * logit)
  assert hidden.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves(head)} == {
    np.dtype('f')
  }
  for got, expected in zip([hidden, *jax.tree.leaves(head)], gradients, strict=True):
    near(np.asarray(got, 'f') * 128, expected * 128, 2**-7)
  # Logits and the gradient of hidden states are rounded, and what is summed over chunks is not.
  products = re.findall(r'(\w+)\[[\d,]+\] = dot_general', str(jaxpr))
  assert sorted(products) == ['bf16', 'bf16', 'f32']


@pytest.mark.parametrize('wraps', ['vmap', 'scan', 'remat'])
def test_it_can_be_mapped_scanned_and_computed_again(wraps):
  owns = [drawn(seed, (2, 7, 4), 6, True, True) for seed in range(3)]
  targets = np.random.default_rng(1).integers(0, 6, (3, 2, 7)).astype('i')
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *owns)

  def loss(own, targets):
    return cross_entropy(own, targets)[0]

  def gradient(own, targets):
    value, found = jax.value_and_grad(loss, allow_int=True)(own, targets)
    return value, found.hidden_BxLxD, found.head

  if wraps == 'remat':
    loss = jax.checkpoint(loss)
  with chunks_of(4, 6):
    want = [gradient(own, some) for own, some in zip(owns, targets)]
    if wraps == 'scan':
      got = jax.lax.scan(lambda _, x: (None, gradient(*x)), None, (stacked, targets))[1]
    else:
      got = jax.vmap(gradient)(stacked, targets)
  jax.tree.map(lambda a, *b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, *want)


def test_losses_of_single_tokens_have_no_gradient_and_logits_may_be_given():
  own, teacher = (drawn(seed, (2, 5, 4), 6, True, False) for seed in (0, 1))
  targets = np.random.default_rng(1).integers(0, 6, (2, 5)).astype('i')
  given_ = own, targets, teacher, (0.7, 0.4), 2.0
  with chunks_of(3, 6):
    chunked, plain = with_gradients(*given_), with_gradients(*given_, plain=True)

  def beside(hidden, whole):
    read = own._replace(hidden_BxLxD=hidden)
    return cross_entropy(kernel.all_logits(read) if whole else read, targets)[1].nats.sum()

  jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), chunked, plain)
  for whole in (False, True):
    assert not np.any(jax.grad(beside)(own.hidden_BxLxD, whole))
