"""Layers that tokens or sequences skip, against loops over tokens in NumPy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from configs import base
from sparse_lm.core import slots
from sparse_lm.core.errors import UserError
from sparse_lm.core.estimator import ESTIMATORS
from sparse_lm.layers.record import SOWN
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm
from sparse_lm.model.block import Block

BATCH, LENGTH, WIDTH, HIDDEN, VOCAB = 2, 8, 8, 12, 11
SEEDS = st.integers(0, 2**31)
MODES = pytest.mark.parametrize('mode', lm.MODES)
BY_ESTIMATOR = pytest.mark.parametrize('estimator', ESTIMATORS)
DRAWS = {'gates': jax.random.key(5)}
HERE = 0.7  # of what the block reads of its own token


def small(**depth):
  config = base.get_config()
  config.data.context = LENGTH
  config.model.update({'layers': 2, 'width': WIDTH, 'hidden': HIDDEN, 'heads': 2, 'kv_heads': 2})
  with config.unlocked():
    config.depth.update(depth)
  return config


SPEC = Spec.from_config(small().model, vocab=VOCAB, context=LENGTH)


def plain_block(x_BxLxD, positions_BxL, valid_BxL, mode):
  """A block that is soon written twice: reads earlier valid tokens, the less the farther away."""
  apart = positions_BxL[:, :, None] - positions_BxL[:, None, :]
  reads = jnp.where((apart > 0) & valid_BxL[:, None, :], 1 / (1 + jnp.abs(apart)), 0.0)
  return jnp.tanh(HERE * x_BxLxD + jnp.einsum('bls,bsd->bld', reads, x_BxLxD))


def plain_loop(x_BxLxD, positions_BxL, enters_BxL):
  """What it returns for tokens that enter, which are all that it reads; zeros for the others."""
  y = np.zeros(x_BxLxD.shape)
  for b, t in zip(*np.nonzero(enters_BxL)):
    total = HERE * x_BxLxD[b, t].astype(np.float64)
    for s in np.flatnonzero(enters_BxL[b, :t]):
      total += x_BxLxD[b, s] / (1 + positions_BxL[b, t] - positions_BxL[b, s])
    y[b, t] = np.tanh(total)
  return y


class Layer(nn.Module):
  """One layer as the model builds it."""

  depth: Callable[[], nn.Module]
  real: bool

  @nn.compact
  def __call__(self, x, positions, valid, mode):
    return self.depth()(REAL(name='block') if self.real else plain_block, x, positions, valid, mode)


def method(slot, name, /, **fields):
  return functools.partial(slots.method(slot, name), **fields)


REAL = functools.partial(
  Block,
  SPEC,
  method('attention', 'full', spec=SPEC, name='attention'),
  method('mlp', 'dense', spec=SPEC, name='mlp', activation=method('activation', 'relu2')),
)


@functools.cache
def layer(name, /, real=False, **fields):
  spec = {} if name == 'every' else {'spec': SPEC}
  return Layer(method('depth', name, name='depth', **spec, **fields), real)


@functools.cache
def applied(module, mode):
  """`(params, x, positions, valid, rngs) -> (y, what was sown)`."""
  return jax.jit(
    lambda params, x, positions, valid, rngs=None: module.apply(
      {'params': params}, x, positions, valid, mode, rngs=rngs, mutable=list(SOWN)
    )
  )


@functools.cache
def shapes(module):
  inputs = jnp.zeros((1, LENGTH, WIDTH)), jnp.zeros((1, LENGTH), int), jnp.ones((1, LENGTH), bool)
  return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, 'eval')).get('params', {})


def numbers(module, seed, batch=BATCH):
  """Random parameters, inputs, places with gaps between them, and no token that is not valid."""
  draw = np.random.default_rng(seed)
  params = jax.tree.map(lambda a: draw.normal(0, 0.5, a.shape).astype('f'), shapes(module))
  x = draw.normal(0, 2, (batch, LENGTH, WIDTH)).astype('f')
  positions = np.cumsum(draw.integers(1, 4, (batch, LENGTH)), axis=1)
  return params, (x, positions, np.ones((batch, LENGTH), bool))


def unit(x):
  x = x.astype(np.float64)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def sigmoid(logits):
  return 1 / (1 + np.exp(-logits))


# ---- mixture_of_depths


def weights(params, x):
  return unit(x) @ params['depth']['router']['kernel'][:, 0].astype(np.float64)


def top(r_BxL, valid_BxL, seats):
  """bool: the valid tokens of each sequence with the largest weights, of equal ones the earlier."""
  enters = np.zeros(r_BxL.shape, bool)
  for b, r in enumerate(r_BxL):
    order = sorted(np.flatnonzero(valid_BxL[b]), key=lambda t: (-round(r[t], 4), t))
    enters[b, order[:seats]] = True
  return enters


def predicted(params, x):
  """The predictor's logits."""
  p = params['depth']['router_predictor']
  seen = np.concatenate([unit(x), weights(params, x)[..., None]], axis=-1)
  return seen @ p['kernel'][:, 0].astype(np.float64) + p['bias'][0]


def cross_entropy(logits, chosen):
  p = sigmoid(logits)
  return -np.mean(np.where(chosen, np.log(p), np.log(1 - p)))


def mixed(params, x, positions, enters):
  return x + weights(params, x)[..., None] * plain_loop(x, positions, enters)


def decided(r_BxL):
  return np.diff(np.sort(r_BxL, axis=-1)).min() > 1e-4


@given(SEEDS, st.integers(0, LENGTH - 4))
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize(('capacity', 'seats'), [(0.125, 1), (0.45, 4), (1.0, 8)])
def test_training_equals_a_loop_over_the_tokens_that_the_router_likes_best(
  capacity, seats, seed, lost
):
  module = layer('mixture_of_depths', capacity=capacity)
  params, (x, positions, valid) = numbers(module, seed)
  valid = np.random.default_rng(seed).permuted(np.arange(LENGTH) >= np.full((2, 1), lost), axis=1)
  assume(decided(weights(params, x)))
  y, sown = applied(module, 'train')(params, x, positions, valid)
  enters = top(weights(params, x), valid, seats)
  assert_allclose(y, mixed(params, x, positions, enters), rtol=1e-4, atol=1e-5)
  assert_array_equal(np.any(y != x, axis=-1), enters)
  if valid.sum(1).min() >= seats:
    logits = predicted(params, x)
    assert float(sown['losses']['depth']['predictor']) == pytest.approx(
      cross_entropy(logits, enters), rel=1e-4
    )
    accuracy = np.mean((logits > 0) == enters)
    assert float(sown['stats']['depth']['predictor_accuracy']) == pytest.approx(accuracy)


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_of_equal_tokens_the_earlier_enters(seed):
  module = layer('mixture_of_depths', capacity=0.45)
  params, (x, positions, valid) = numbers(module, seed)
  # Three kinds of token, whose weights are those of one channel and so exactly equal.
  kinds = np.random.default_rng(seed).integers(0, 3, (BATCH, LENGTH))
  x, kernel = x[0, :3][kinds], np.zeros((WIDTH, 1), np.float32)
  kernel[0] = 2
  params['depth']['router']['kernel'] = kernel
  r = weights(params, x)
  assume(decided(weights(params, x[:1, np.unique(kinds[0], return_index=True)[1]])))
  enters = top(r, valid, 4)
  y, _ = applied(module, 'train')(params, x, positions, valid)
  assert_allclose(y, mixed(params, x, positions, enters), rtol=1e-4, atol=1e-5)


def test_with_capacity_for_all_every_token_enters_the_real_block():
  module = layer('mixture_of_depths', real=True, capacity=1.0)
  params, inputs = numbers(module, 0)
  added = REAL().apply({'params': params['block']}, *inputs, 'train')
  want = inputs[0] + weights(params, inputs[0])[..., None] * added
  assert_allclose(applied(module, 'train')(params, *inputs)[0], want, rtol=1e-4, atol=1e-5)


@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_in_the_real_block_tokens_keep_their_places_and_read_only_what_enters(seed):
  module = layer('mixture_of_depths', real=True, capacity=0.5)
  params, (x, positions, valid) = numbers(module, seed)
  r = weights(params, x)
  assume(decided(r))
  enters = top(r, valid, 4)
  # All tokens at their places, those that skip hidden from attention: nothing is gathered.
  added = masked_block(params['block'], x, positions, enters)
  want = x + np.where(enters[..., None], r[..., None] * added, 0)
  y, _ = applied(module, 'train')(params, x, positions, valid)
  assert_allclose(y, want, rtol=1e-3, atol=1e-4)
  moved = masked_block(params['block'], x, np.cumsum(enters, axis=1), enters)
  assert np.abs(moved - added)[enters].max() > 1e-3  # places are not what gathering would number


@jax.jit
def masked_block(params, x, positions, enters):
  return REAL().apply({'params': params}, x, positions, enters, 'eval')


def test_gradients_reach_the_router_and_the_predictors_loss_trains_the_predictor_alone():
  module = layer('mixture_of_depths', capacity=0.45)
  params, (x, positions, valid) = numbers(module, 1)
  assert decided(weights(params, x))
  enters = top(weights(params, x), valid, 4)
  draw = np.random.default_rng(2)
  toward = jax.tree.map(lambda a: draw.standard_normal(a.shape), params)
  aside, target = draw.standard_normal((2, *x.shape))

  def output(params, x):
    return jnp.sum(applied(module, 'train')(params, x, positions, valid)[0] * target)

  def auxiliary(params, x):
    return applied(module, 'train')(params, x, positions, valid)[1]['losses']['depth']['predictor']

  def slope(gradient, *directions):
    return float(
      sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, directions)))
    )

  def difference(f):
    return (f(1e-6) - f(-1e-6)) / 2e-6

  moved = lambda step: jax.tree.map(lambda a, d: a + step * d, params, toward)  # noqa: E731
  by_hand = difference(
    lambda step: (mixed(moved(step), x + step * aside, positions, enters) * target).sum()
  )
  found = jax.jit(jax.grad(output, argnums=(0, 1)))(params, x)
  assert slope(found, toward, aside) == pytest.approx(by_hand, rel=1e-3)
  assert np.abs(found[0]['depth']['router']['kernel']).min() > 1e-3
  assert not np.any(found[0]['depth']['router_predictor']['kernel'])

  found = jax.jit(jax.grad(auxiliary, argnums=(0, 1)))(params, x)
  assert not np.any(found[1]) and not np.any(found[0]['depth']['router']['kernel'])

  def of_predictor(step):
    part = {'router_predictor': moved(step)['depth']['router_predictor']}
    return cross_entropy(predicted({'depth': params['depth'] | part}, x), enters)

  assert slope(found, toward, aside) == pytest.approx(difference(of_predictor), rel=1e-3)


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_evaluation_follows_the_predictor(seed):
  module = layer('mixture_of_depths', capacity=0.125)
  params, (x, positions, valid) = numbers(module, seed)
  valid &= np.arange(LENGTH) != 2
  logits = predicted(params, x)
  assume(np.abs(logits).min() > 1e-4)
  enters = (logits > 0) & valid
  y, sown = applied(module, 'eval')(params, x, positions, valid)
  assert_allclose(y, mixed(params, x, positions, enters), rtol=1e-4, atol=1e-5)
  assert float(sown['gates']['depth']['active']) == pytest.approx(enters.mean())
  assert 'losses' not in sown


@pytest.mark.parametrize('cut', [1, 4, 7])
def test_training_reads_later_tokens_and_evaluation_does_not(cut):
  module = layer('mixture_of_depths', real=True, capacity=0.25)
  params, (x, positions, valid) = numbers(module, 3)
  params['depth']['router_predictor']['bias'] += 3  # most tokens enter, so there is much to read
  other, favourite = x.copy(), params['depth']['router']['kernel'][:, 0]
  # Liked less than any before or more than any: those before them enter, or have no seat left.
  other[:, cut:] = -favourite
  x[:, cut:] = favourite
  for mode in lm.MODES:
    run = applied(module, mode)
    before, after = (np.asarray(run(params, v, positions, valid)[0]) for v in (x, other))
    earlier = np.abs(before - after)[:, :cut].max()
    assert earlier > 0.01 if mode == 'train' else earlier < 1e-6
    assert np.abs(before - after)[:, cut:].max() > 0.1
  model = lm.from_config(small(name='mixture_of_depths'), VOCAB)
  assert lm.causal(model) == {'train': False, 'eval': True}


@pytest.mark.parametrize('capacity', [0.0, 1 / 16, 0.06, 1.01, -0.5])
def test_capacities_without_a_token_or_above_all_are_refused(capacity):
  with pytest.raises(UserError) as refused:
    lm.from_config(small(name='mixture_of_depths', capacity=capacity), VOCAB)
  assert f'config.depth.capacity={capacity}' in str(refused.value)
  assert 'rounds to 1 of the 8 tokens' in str(refused.value) and '\n' not in str(refused.value)


def test_capacities_for_one_token_and_for_all_are_accepted():
  for capacity in (0.07, 0.125, 1.0):
    lm.from_config(small(name='mixture_of_depths', capacity=capacity), VOCAB)


# ---- token_gate


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
def test_tokens_enter_where_their_gate_is_open_and_are_no_key_elsewhere(estimator, seed):
  module = layer('token_gate', estimator=estimator)
  params, (x, positions, valid) = numbers(module, seed)
  logits = router_logits(params, x)
  assume(min(np.abs(logits).min(), np.abs(logits + np.log(11)).min()) > 1e-4)
  for mode, rngs in (('eval', None), ('train', None), ('train', DRAWS)):
    y, sown = applied(module, mode)(params, x, positions, valid, rngs)
    opened, weight, evaluated = by_estimator(estimator, logits, bool(rngs))
    if estimator == 'random':
      evaluated = np.arange(x[..., 0].size) < 14  # 0.9 of 16
    assert float(sown['gates']['depth']['active']) == pytest.approx(evaluated.mean())
    if estimator == 'random' or (rngs and estimator in ('gumbel_sigmoid', 'reinforce')):
      opened = weight = np.any(y != x, axis=-1)  # drawn, all or nothing
      assert estimator != 'random' or opened.sum() == 14
    elif rngs and estimator == 'hard_concrete':
      continue
    want = x + weight[..., None] * plain_loop(x, positions, opened)
    assert_allclose(y, want, rtol=1e-4, atol=1e-5)


@MODES
def test_in_the_real_block_what_a_skipping_token_holds_reaches_no_other(mode):
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
  params, inputs = numbers(layer('every'), 6)
  y, _ = applied(layer('every'), mode)(params, *inputs)
  assert_allclose(y, inputs[0] + plain_loop(*inputs), rtol=1e-4, atol=1e-5)


@MODES
@BY_ESTIMATOR
@pytest.mark.parametrize('name', ['token_gate', 'layer_gate'])
def test_gates_that_are_open_change_nothing_and_closed_ones_leave_the_identity(
  name, estimator, mode
):
  for opened in (True, False):
    module, params, inputs = forced(name, estimator, opened)
    y, sown = applied(module, mode)(params, *inputs, DRAWS)
    want = inputs[0] + opened * plain_loop(*inputs)
    assert_allclose(y, want, rtol=1e-4, atol=1e-5 * opened)
    assert float(sown['gates']['depth']['active']) == opened


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
  assert float(sown['gates']['depth']['active']) == pytest.approx(
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
    assert float(sown['gates']['depth']['active']) == (logit > edge)


def test_a_layers_logit_moves_ten_times_as_fast_as_its_parameter():
  module = layer('layer_gate')
  params, inputs = numbers(module, 10)
  for logit in (-1.3, 0.4):  # the straight-through gradient is the sigmoid's, open or closed
    params['depth']['logit'] = np.float32(logit / 10)
    found = jax.grad(lambda p: jnp.sum(applied(module, 'train')(p, *inputs, DRAWS)[0]))(params)
    slope = sigmoid(logit) * (1 - sigmoid(logit))
    want = 10 * slope * plain_loop(*inputs).sum()
    assert float(found['depth']['logit']) == pytest.approx(want, rel=1e-3)


def test_gates_start_open_with_the_configured_probability():
  for name, leaf, scale in (('token_gate', 'bias', 1), ('layer_gate', 'logit', 10)):
    _, inputs = numbers(layer(name), 0)
    gate = layer(name, open=0.8).init(jax.random.key(0), *inputs, 'eval')['params']['depth']
    logit = scale * gate.get('router', gate)[leaf]
    assert_allclose(sigmoid(np.asarray(logit, np.float64)), 0.8, rtol=1e-5)


@pytest.mark.parametrize('name', ['token_gate', 'layer_gate'])
@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'estimator': 'gumble'}, 'config.depth.estimator'),
    ({'open': 1.0}, 'config.depth.open=1.0'),
    ({'open': 0.0}, 'config.depth.open=0.0'),
  ],
)
def test_bad_gates_are_refused_in_one_line(name, fields, message):
  with pytest.raises(UserError) as refused:
    lm.from_config(small(name=name, **fields), VOCAB)
  assert message in str(refused.value) and '\n' not in str(refused.value)
