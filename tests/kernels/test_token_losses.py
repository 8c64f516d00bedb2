"""Losses of single tokens in chunks of the vocabulary, against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from sparse_lm.kernels import token_losses as module
from sparse_lm.kernels.cross_entropy import Head, Readout
from sparse_lm.kernels.token_losses import token_losses

VOCAB, WIDTH = 53, 6


def draw(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape).astype('f')


HEADS = {
  'tied': Head(table_VxD=draw(VOCAB, WIDTH)),
  'own': Head(kernel_DxV=draw(WIDTH, VOCAB)),
  'biased': Head(kernel_DxV=draw(WIDTH, VOCAB), bias_V=3 * draw(VOCAB)),
  'bigrams': Head(table_VxD=draw(VOCAB, WIDTH), bigrams_VxV=draw(VOCAB, VOCAB)),
}


@pytest.mark.parametrize('chunk', [8, 26, 53, 64])  # 8 and 26 do not divide 53
@pytest.mark.parametrize('name', HEADS)
def test_losses_are_those_of_scipy(name, chunk, monkeypatch):
  monkeypatch.setattr(module, 'CHUNK', chunk)
  monkeypatch.setattr(module, 'LOGITS_BYTES', 0)
  head = HEADS[name]
  hidden_BxLxD = 5 * draw(3, 40, WIDTH)
  tokens_BxL = np.random.default_rng(1).integers(0, VOCAB, (3, 40)).astype(np.int32)
  targets_BxL = np.concatenate([tokens_BxL[:, 1:], tokens_BxL[:, :1]], axis=1)
  targets_BxL[0, :4] = 0, VOCAB - 1, 7, 8
  kernel = head.kernel_DxV if head.table_VxD is None else head.table_VxD.T
  logits = hidden_BxLxD.astype(np.float64) @ kernel
  if head.bias_V is not None:
    logits += head.bias_V
  if head.bigrams_VxV is not None:
    logits += head.bigrams_VxV[tokens_BxL]
  best = logits.argmax(-1)
  targets_BxL[1] = best[1]
  want = -np.take_along_axis(log_softmax(logits, -1), targets_BxL[..., None], -1)[..., 0]
  readout = Readout(hidden_BxLxD, head, tokens_BxL)
  for predicted in (readout, jnp.asarray(logits, jnp.float32)):
    found = jax.jit(token_losses)(predicted, targets_BxL)
    np.testing.assert_allclose(found.nats, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.likeliest, targets_BxL == best)
  assert found.likeliest[1].all() and not found.likeliest[0].all()


def test_large_logits_do_not_overflow_and_no_logits_of_all_tokens_exist(monkeypatch):
  monkeypatch.setattr(module, 'CHUNK', 8)
  monkeypatch.setattr(module, 'LOGITS_BYTES', 0)
  readout = Readout(1e4 * draw(1, 5, WIDTH), HEADS['tied'])
  targets = np.zeros((1, 5), np.int32)
  assert np.isfinite(token_losses(readout, targets).nats).all()
  lowered = jax.jit(token_losses).lower(readout, targets).as_text()
  assert f'5x{VOCAB}x' not in lowered and '5x8x' in lowered
