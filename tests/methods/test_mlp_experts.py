"""Mixtures of experts against loops over tokens in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from configs import base
from sparse_lm.core import cost, slots
from sparse_lm.core.errors import UserError
from sparse_lm.layers.spec import Spec

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS = 3, 8, 8, 12, 4
TOKENS = BATCH * LENGTH
RELU2 = functools.partial(slots.method('activation', 'relu2'), name='activation')
SEEDS = st.integers(0, 2**31)


def module(name, dtype='float32', **fields):
  config = base.get_config()
  config.model.update({'width': WIDTH, 'hidden': HIDDEN, 'bias': True, 'dtype': dtype})
  spec = Spec.from_config(config.model, vocab=11, context=LENGTH)
  fields = {'experts': EXPERTS, **fields}
  return slots.method('mlp', name)(spec=spec, activation=RELU2, **fields)


# 24 tokens want 12 seats each on average (6 with k = 1); the tight ones have half of that.
TOP2 = module('moe_topk', k=2, capacity=0.5)
TOP1 = module('moe_topk', k=1, capacity=0.5)
CHOICE = module('expert_choice', visits=1.5, decay=0.9)
TAKES = 9  # of the 24 tokens an expert takes 1.5 / 4


@functools.cache
def applied(mlp, mode, mutable=('losses', 'stats', 'gates')):
  """`(variables, x, rngs) -> (y, what was sown)`."""
  return jax.jit(lambda v, x, rngs=None: mlp.apply(v, x, mode, rngs=rngs, mutable=list(mutable)))


@functools.cache
def shapes(mlp):
  x = jnp.zeros((BATCH, LENGTH, WIDTH))
  return jax.eval_shape(lambda: mlp.init(jax.random.key(0), x, 'eval'))


def numbers(mlp, seed):
  """Random variables and inputs."""
  draw = np.random.default_rng(seed)
  variables = jax.tree.map(
    lambda a: draw.normal(0, 0.5, a.shape).astype(np.float32),
    {'params': shapes(mlp)['params']},
  )
  if 'router' in shapes(mlp):
    variables['router'] = {'threshold': draw.uniform(0.1, 0.5, EXPERTS).astype(np.float32)}
  return variables, draw.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)


def alike(variables):
  """The same variables with every expert a copy of the first."""
  experts = jax.tree.map(lambda a: np.repeat(a[:1], len(a), 0), variables['params']['experts'])
  return {**variables, 'params': {**variables['params'], 'experts': experts}}


def probabilities(params, x):
  logits = x.astype(np.float64) @ params['router']['kernel'].astype(np.float64)
  odds = np.exp(logits)
  return odds / odds.sum(-1, keepdims=True)


def expert(params, e, x):
  p = params['experts']
  h = np.maximum(x.astype(np.float64) @ p['up'][e] + p['up_bias'][e], 0) ** 2
  return h @ p['down'][e] + p['down_bias'][e]


def decided(scores, rank):
  """Whether float32 rounding cannot change who is among the first `rank` of the last axis."""
  ordered = -np.sort(-scores, axis=-1)
  return rank == scores.shape[-1] or (ordered[..., rank - 1] - ordered[..., rank]).min() > 1e-5


def token_choice(params, x_BxLxD, k, capacity):
  """Output, pairs that asked for each expert, and pairs dropped; `capacity` is a count of seats."""
  y, load, dropped = np.zeros(x_BxLxD.shape), np.zeros(EXPERTS, int), 0
  probability = probabilities(params, x_BxLxD)
  for l in range(LENGTH):  # position first, then sequence, then choice
    for b in range(BATCH):
      p = probability[b, l]
      chosen = np.argsort(-p, kind='stable')[:k]
      for e in chosen:
        if load[e] < capacity:
          weight = p[e] / p[chosen].sum() if k > 1 else p[e]
          y[b, l] += weight * expert(params, e, x_BxLxD[b, l])
        else:
          dropped += 1
        load[e] += 1
  return y, load, dropped


def auxiliary(params, x, load, balance=0.01, z=0.001):
  """Switch's balance loss, equation 4, and ST-MoE's z-loss, equation 5."""
  mean = probabilities(params, x).mean((0, 1))
  logits = x.astype(np.float64) @ params['router']['kernel']
  return {
    'balance': balance * EXPERTS * (load / load.sum() * mean).sum(),
    'z': z * (np.log(np.exp(logits).sum(-1)) ** 2).mean(),
  }


def observed(params, x, load, dropped):
  p = probabilities(params, x)
  return {
    'load': load / max(load.sum(), 1),
    'max_violation': load.max() / load.mean() - 1,
    'entropy': -(p * np.log(p)).sum(-1).mean(),
    'drop_rate': dropped / load.sum(),
    'dead_experts': (load == 0).mean(),
  }


def close(got, want, scale=1e-5):
  assert_allclose(got, want, rtol=1e-4, atol=scale * max(np.abs(want).max(), 1))


def sown_equals(got, want):
  assert got.keys() == want.keys()
  for name in want:
    assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


@given(SEEDS, st.sampled_from([0.5, 3.0]))
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize(('mlp', 'seats'), [(TOP1, 3), (TOP2, 6)], ids=['k=1', 'k=2'])
def test_training_equals_a_loop_with_seats_by_position_then_sequence(mlp, seats, seed, sharp):
  variables, x = numbers(mlp, seed)
  params = variables['params']
  params['router']['kernel'] *= sharp
  assume(decided(probabilities(params, x), mlp.k))
  y, sown = applied(mlp, 'train')(variables, x)
  want, load, dropped = token_choice(params, x, mlp.k, seats)
  assert dropped > 0
  close(y, want)
  sown_equals(sown['losses'], auxiliary(params, x, load))
  sown_equals(sown['stats'], observed(params, x, load, dropped))
  assert float(sown['gates']['active']) == pytest.approx(1 - dropped / load.sum())


@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_evaluation_drops_nothing_and_sows_no_loss(seed):
  variables, x = numbers(TOP2, seed)
  assume(decided(probabilities(variables['params'], x), 2))
  y, sown = applied(TOP2, 'eval')(variables, x)
  want, load, dropped = token_choice(variables['params'], x, 2, TOKENS)
  close(y, want)
  sown_equals(sown['stats'], observed(variables['params'], x, load, dropped))
  assert float(sown['gates']['active']) == 1 and dropped == 0 and 'losses' not in sown


def test_gradients_of_both_executors_equal_finite_differences_of_the_loop():
  variables, x = numbers(TOP2, 3)
  params = jax.tree.map(lambda a: a.astype(np.float64), variables['params'])
  draw = np.random.default_rng(4)
  toward = jax.tree.map(lambda a: draw.standard_normal(a.shape), params)
  aside, target = draw.standard_normal((2, *x.shape))

  def by_hand(step):
    moved = jax.tree.map(lambda a, d: a + step * d, params, toward)
    y, load, _ = token_choice(moved, x + step * aside, 2, 6)
    return (y * target).sum() + sum(auxiliary(moved, x + step * aside, load).values())

  for executor in ('sort', 'einsum'):
    run = applied(module('moe_topk', k=2, capacity=0.5, executor=executor), 'train')

    @jax.jit
    def loss(params, x, run=run):
      y, sown = run({'params': params}, x)
      return jnp.sum(y * target) + sum(jax.tree.leaves(sown['losses']))

    to_params, to_x = jax.grad(loss, argnums=(0, 1))(variables['params'], x)
    slopes = jax.tree.map(lambda g, d: (g * d).sum(), to_params, toward)
    slope = sum(jax.tree.leaves(slopes)) + (to_x * aside).sum()
    want = (by_hand(1e-6) - by_hand(-1e-6)) / 2e-6
    assert float(slope) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(('mlp', 'mode'), [(TOP2, 'eval'), (CHOICE, 'train'), (CHOICE, 'eval')])
def test_executors_agree(mlp, mode):
  variables, x = numbers(mlp, 5)
  slow = applied(mlp.clone(executor='einsum'), mode)(variables, x)
  fast = applied(mlp, mode)(variables, x)
  assert np.abs(fast[0]).max() > 1
  jax.tree.map(functools.partial(assert_allclose, rtol=1e-4, atol=1e-4), fast, slow)


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize(('experts', 'k'), [(4, 2), (4, 1), (1, 1)])
def test_identical_experts_with_room_equal_one_mlp(experts, k, mode):
  mlp = module('moe_topk', experts=experts, k=k, capacity=float(experts))
  variables, x = numbers(mlp, 6)
  variables = alike(variables)
  # The router's inputs are jittered, the experts' are not.
  y, _ = applied(mlp, mode)(variables, x, {'gates': jax.random.key(0)})
  want = expert(variables['params'], 0, x)
  if k == 1:
    top = probabilities(variables['params'], x).max(-1, keepdims=True)
    jitter = 0.05 if mode == 'train' and experts > 1 else 1e-6
    ratio = np.asarray(y, np.float64) / want
    assert_allclose(ratio, np.broadcast_to(top, y.shape), rtol=jitter, atol=1e-3)
  else:
    close(y, want, scale=1e-6)


def routed_to(targets, strength=40.0):
  """Variables and inputs in which token i goes to expert `targets[i]` with near certainty."""
  variables, _ = numbers(TOP1, 7)
  variables['params']['router']['kernel'] = strength * np.eye(WIDTH, EXPERTS, dtype=np.float32)
  return variables, np.eye(WIDTH, dtype=np.float32)[targets].reshape(BATCH, LENGTH, WIDTH)


def balance_loss(variables, x):
  return float(applied(TOP1, 'train')(variables, x)[1]['losses']['balance'])


def test_balance_loss_is_its_coefficient_at_uniform_routing():
  variables, x = routed_to(np.arange(TOKENS) % EXPERTS)
  assert balance_loss(variables, x) == pytest.approx(0.01, rel=1e-6)
  # So it is where all probabilities are equal, whoever the ties go to.
  variables['params']['router']['kernel'] *= 0
  _, sown = applied(TOP1, 'train')(variables, x)
  assert float(sown['losses']['balance']) == pytest.approx(0.01, rel=1e-6)
  assert float(sown['losses']['z']) == pytest.approx(0.001 * np.log(4) ** 2, rel=1e-5)


def test_imbalanced_routing_costs_more_than_balanced():
  crowd = [np.where(np.arange(TOKENS) < n, 0, np.arange(TOKENS) % 4) for n in (0, 8, 16, 24)]
  costs = [balance_loss(*routed_to(targets)) for targets in crowd]
  assert costs == sorted(costs) and costs[0] < 0.8 * costs[1]
  assert costs[-1] == pytest.approx(0.01 * EXPERTS, rel=1e-5)  # one expert has all


@pytest.mark.parametrize('mlp', [TOP1, TOP2], ids=['k=1', 'k=2'])
def test_a_full_expert_drops_no_token_for_a_later_one(mlp):
  variables, x = numbers(mlp, 8)
  run = applied(mlp, 'train')
  y, sown = run(variables, x)
  assert float(sown['stats']['drop_rate']) > 0.3
  for cut in (1, 4, 7):
    # Later tokens that all want what the most crowded expert gives.
    other = x.copy()
    other[:, cut:] = 3 * variables['params']['router']['kernel'][:, sown['stats']['load'].argmax()]
    moved, _ = run(variables, other)
    assert_array_equal(moved[:, :cut], y[:, :cut])
    assert np.abs(moved[:, cut:] - y[:, cut:]).max() > 0.1


@pytest.mark.parametrize('mlp', [TOP2, CHOICE], ids=['moe_topk', 'expert_choice'])
def test_evaluation_does_not_depend_on_the_rest_of_the_batch(mlp):
  variables, x = numbers(mlp, 9)
  alone, _ = applied(mlp, 'eval')(variables, np.repeat(x[:1], BATCH, 0))
  together, _ = applied(mlp, 'eval')(variables, x)
  assert_allclose(together[0], alone[2], rtol=1e-5, atol=1e-5)
  assert np.abs(together[1] - alone[1]).max() > 0.1
