"""Layers that tokens or sequences skip by a gate, against loops over tokens in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from numpy.testing import assert_allclose
from one_layer import (
  BATCH,
  BY_ESTIMATOR,
  DRAWS,
  LENGTH,
  MODES,
  SEEDS,
  VOCAB,
  applied,
  layer,
  numbers,
  plain_loop,
  sigmoid,
  small,
  unit,
)

from sparse_lm.core.errors import UserError
from sparse_lm.core.estimator import ESTIMATORS
from sparse_lm.layers.sow import SOWN
from sparse_lm.model import lm


def by_estimator(estimator, logits, draws):
  """What gates let in, what that is multiplied with, and what evaluation lets in."""
  p, fires = sigmoid(logits), logits > 0
  if estimator == 'soft':
    return fires | draws, p, fires
  if estimator == 'hard_concrete':
    stretched = p * 1.2 - 0.1
    return stretched > 0, np.clip(stretched, 0, 1), stretched > 0
  return fires, fires, fires


def router_logits(params, x):
  p = params['depth']['router']
  return unit(x) @ p['kernel'][:, 0].astype(np.float64) + p['bias'][0]


@given(SEEDS)
@settings(deadline=None, max_examples=10)
@BY_ESTIMATOR
def test_tokens_enter_if_their_gate_is_open_and_otherwise_no_query_reads_them(estimator, seed):
  module = layer('token_gate', estimator=estimator)
  params, (x, positions, valid) = numbers(module, seed)
  logits = router_logits(params, x)
  assume(min(np.abs(logits).min(), np.abs(logits + np.log(11)).min()) > 1e-4)
  for mode, rngs in (('eval', None), ('train', None), ('train', DRAWS)):
    y, sown = applied(module, mode)(params, x, positions, valid, rngs)
    opened, weight, evaluated = by_estimator(estimator, logits, bool(rngs))
    if estimator == 'random':
      evaluated = np.arange(x[..., 0].size) < 14  # 0.9 of 16
    assert np.mean(sown['gates']['depth']['active']) == pytest.approx(evaluated.mean())
    if estimator == 'random' or (rngs and estimator in ('gumbel_sigmoid', 'reinforce')):
      opened = weight = np.any(y != x, axis=-1)  # drawn, all or nothing
      assert estimator != 'random' or opened.sum() == 14
    elif rngs and estimator == 'hard_concrete':
      continue
    want = x + weight[..., None] * plain_loop(x, positions, opened)
    assert_allclose(y, want, rtol=1e-4, atol=1e-5)


@MODES
def test_in_the_real_block_a_skipping_token_changes_no_other_token(mode):
  module = layer('token_gate', real=True)
  params, (x, positions, valid) = numbers(module, 4)
  params['depth']['router']['bias'][:] = 0
  params['depth']['router']['kernel'][1:] = 0  # the first channel's sign decides
  opened = router_logits(params, x) > 0
  assert 3 < opened[:, 1:-1].sum() < 9
  run = applied(module, mode)
  before = run(params, x, positions, valid)[0]
  for b, t in np.argwhere(np.ones((BATCH, LENGTH - 1))):
    other = x.copy()
    other[b, t, 1:] = -x[b, t, 1:] + 1
    moved = np.abs(run(params, other, positions, valid)[0] - before).max(-1)
    later = moved[b, t + 1 :][opened[b, t + 1 :]]
    moved[b, t] = 0
    if opened[b, t]:
      assert not later.size or later.min() > 1e-4
    else:
      assert moved.max() < 1e-6


@MODES
@BY_ESTIMATOR
def test_token_gates_keep_to_the_past_whatever_the_estimator(estimator, mode):
  module = layer('token_gate', real=True, estimator=estimator)
  run, read = applied(module, mode), 0
  for seed in range(5):
    params, (x, positions, valid) = numbers(module, seed)
    before = run(params, x, positions, valid, DRAWS)[0]
    for t in (1, 3, 5, 7):
      other = x.copy()
      other[:, t] = 1 - 2 * x[:, t]
      moved = np.abs(run(params, other, positions, valid, DRAWS)[0] - before)
      assert moved[:, :t].max() < 1e-6
      read = max(read, moved[:, t + 1 :].max(initial=0))
  assert read > 0.01


# ---- layer_gate, and what all gates share


def forced(name, estimator, opened):
  """A layer whose gates are all open or all closed."""
  fields = {'open': 0.99 if opened else 0.01} if estimator == 'random' else {}
  module = layer(name, estimator=estimator, **fields)
  params, inputs = numbers(module, 6)
  if name == 'layer_gate':
    params['depth']['logit'] = np.float32(4 if opened else -4)
  else:
    params['depth']['router']['kernel'][:] = 0
    params['depth']['router']['bias'][:] = 40 if opened else -40
  return module, params, inputs


@MODES
def test_every_token_enters_every_layer(mode):
  params, inputs = numbers(layer('residual'), 6)
  y, _ = applied(layer('residual'), mode)(params, *inputs)
  assert_allclose(y, inputs[0] + plain_loop(*inputs), rtol=1e-4, atol=1e-5)


@MODES
@BY_ESTIMATOR
@pytest.mark.parametrize('name', ['token_gate', 'layer_gate'])
def test_open_gates_change_nothing_and_closed_gates_give_the_identity(name, estimator, mode):
  for opened in (True, False):
    module, params, inputs = forced(name, estimator, opened)
    y, sown = applied(module, mode)(params, *inputs, DRAWS)
    want = inputs[0] + opened * plain_loop(*inputs)
    assert_allclose(y, want, rtol=1e-4, atol=1e-5 * opened)
    assert np.mean(sown['gates']['depth']['active']) == opened


@BY_ESTIMATOR
def test_a_layer_is_kept_or_dropped_once_for_each_sequence(estimator, batch=64):
  module = layer('layer_gate', estimator=estimator, open=0.7)
  params, inputs = numbers(module, 8, batch)
  params['depth']['logit'] = np.float32(np.log(0.7 / 0.3) / 10)
  y, sown = applied(module, 'train')(params, *inputs, DRAWS)
  added = plain_loop(*inputs)
  weight = ((y - inputs[0]) * added).sum((1, 2)) / (added**2).sum((1, 2))
  assert_allclose(y, inputs[0] + weight[:, None, None] * added, rtol=1e-3, atol=1e-4)
  if estimator in ('gumbel_sigmoid', 'reinforce', 'random'):
    assert_allclose(weight, np.round(weight), atol=1e-4)
    # 0.7 of 64; drawn one by one they spread with a standard deviation of 3.7.
    assert abs(np.round(weight).sum() - 45) <= (0 if estimator == 'random' else 11)
  elif estimator == 'hard_concrete':
    assert weight.min() < 0.1 and weight.max() > 0.9 and len(np.unique(weight.round(3))) > 8
  else:
    assert_allclose(weight, 0.7 if estimator == 'soft' else 1.0, rtol=1e-4)
  assert np.mean(sown['gates']['depth']['active']) == pytest.approx(
    45 / 64 if estimator == 'random' else 1
  )


@pytest.mark.parametrize('estimator', [e for e in ESTIMATORS if ESTIMATORS[e].learned])
def test_evaluation_moves_in_whole_layers(estimator):
  module = layer('layer_gate', estimator=estimator)
  params, inputs = numbers(module, 9)
  edge = -np.log(11) if estimator == 'hard_concrete' else 0.0
  for logit in (edge - 0.01, edge + 0.01):
    params['depth']['logit'] = np.float32(logit / 10)
    y, sown = applied(module, 'eval')(params, *inputs, DRAWS)
    assert np.any(y != inputs[0], axis=(1, 2)).all() == np.any(y != inputs[0]) == (logit > edge)
    assert np.mean(sown['gates']['depth']['active']) == (logit > edge)


def test_a_layers_logit_moves_ten_times_as_fast_as_its_parameter():
  module = layer('layer_gate')
  params, inputs = numbers(module, 10)
  for logit in (-1.3, 0.4):  # the straight-through gradient is the sigmoid's, open or closed
    params['depth']['logit'] = np.float32(logit / 10)
    found = jax.grad(lambda p: jnp.sum(applied(module, 'train')(p, *inputs, DRAWS)[0]))(params)
    slope = sigmoid(logit) * (1 - sigmoid(logit))
    want = 10 * slope * plain_loop(*inputs).sum()
    assert float(found['depth']['logit']) == pytest.approx(want, rel=1e-3)


@BY_ESTIMATOR
def test_gates_start_open_with_the_configured_probability(estimator):
  for name, leaf, scale in (('token_gate', 'bias', 1), ('layer_gate', 'logit', 10)):
    module = layer(name, open=0.8, estimator=estimator)
    _, inputs = numbers(module, 0)
    gate = module.init(jax.random.key(0), *inputs, 'eval')['params']['depth']
    logit = scale * np.asarray(gate.get('router', gate)[leaf], np.float64)
    # P(s (1.1 + 0.1) - 0.1 > 0) of a stretched concrete variable; of others P(logit + noise > 0).
    shift = 2 / 3 * np.log(0.1 / 1.1) if estimator == 'hard_concrete' else 0.0
    assert_allclose(sigmoid(logit - shift), 0.8, rtol=1e-5)


def test_half_of_the_drawn_hard_concrete_gates_are_open_at_the_start(batch=100):
  module = layer('token_gate', open=0.5, estimator='hard_concrete')
  _, inputs = numbers(module, 0, batch)
  params = module.init(jax.random.key(0), *inputs, 'eval')['params']
  y, sown = applied(module, 'train')(params, *inputs, DRAWS)
  opened = np.any(np.asarray(y) != inputs[0], axis=-1)
  assert opened.mean() == pytest.approx(0.5, abs=0.09)  # 800 draws at logits that differ
  # What is priced is the deterministic gate, which closes below a probability of 0.31 only.
  assert np.mean(sown['gates']['depth']['active']) > 0.7


@pytest.mark.parametrize('name', ['token_gate', 'layer_gate'])
@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'estimator': 'gumble'}, 'config.depth.estimator'),
  ],
)
def test_bad_gates_are_refused_in_one_line(name, fields, message):
  with pytest.raises(UserError) as refused:
    lm.from_config(small(name=name, **fields), VOCAB)
  assert message in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize('estimator', ['straight_through', 'gumbel_sigmoid', 'soft'])
def test_no_gradient_of_a_closed_gate_comes_from_later_tokens(estimator):
  module, half = layer('token_gate', real=True, estimator=estimator), LENGTH // 2
  params, (x, positions, valid) = numbers(module, 3)
  params['depth']['router']['bias'] -= 2.0  # the first token of a sequence finds no key to read

  @jax.jit
  def gradient(x):
    def earlier(params):
      y, _ = module.apply(
        {'params': params}, x, positions, valid, 'train', rngs=DRAWS, mutable=list(SOWN)
      )
      return jnp.sum(jnp.square(y[:, :half]))

    return jax.grad(earlier)(params)['depth']['router']

  other = x.copy()
  other[:, half:] = np.random.default_rng(4).normal(0, 2, other[:, half:].shape)
  before, after = gradient(x), gradient(other)
  assert np.abs(before['kernel']).max() > 1e-3
  jax.tree.map(functools.partial(assert_allclose, rtol=1e-5, atol=1e-6), after, before)
