"""Policy gradients against exact enumeration of every vector of gates."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats
from scipy.special import expit

from sparse_lm.core.estimator import ESTIMATORS
from sparse_lm.train import policy

SEEDS = st.integers(0, 2**31)


class Case(NamedTuple):
  """A batch, and by gate the positions that it decides at and its units there; 8 gates at most."""

  batch: int
  length: int
  gates: tuple[tuple[str, int, int], ...]

  @property
  def where(self):
    """Of each gate in flat order: its name, sequence, position and unit."""
    return [
      (name, *index)
      for name, positions, units in self.gates
      for index in itertools.product(range(self.batch), range(positions), range(units))
    ]


CASES = {
  'a gate a token': Case(2, 4, (('token', 4, 1),)),
  'two gates a token': Case(1, 3, (('token', 3, 1), ('heads', 3, 1))),
  'units of a gate': Case(2, 2, (('heads', 2, 2),)),
  'a gate a sequence': Case(2, 3, (('layer', 1, 1),)),
  'a gate a sequence beside one a token': Case(1, 3, (('layer', 1, 2), ('token', 3, 2))),
}


def actions_of(case):
  """Every vector of actions, `[2^n, n]`."""
  return np.array(list(itertools.product((0, 1), repeat=len(case.where))))


def causal_rewards(case, draw):
  """`[2^n, B, L]`: a random number for every history of a token's own sequence, itself included."""
  actions = actions_of(case)
  rewards = np.empty((len(actions), case.batch, case.length))
  for b, l in itertools.product(range(case.batch), range(case.length)):
    seen = [i for i, (_, *at) in enumerate(case.where) if at[0] == b and at[1] <= l]
    history = actions[:, seen] @ (1 << np.arange(len(seen)))
    rewards[:, b, l] = draw.normal(-3, 1, 1 << len(seen))[history]
  return rewards


def chances(actions, p):
  return np.prod(np.where(actions, p, 1 - p), axis=-1)


def exact_gradient(case, logits, rewards):
  """Of the mean reward a token. It is linear in each probability, so its slope is a difference."""
  actions, p = actions_of(case), expit(logits)
  means = rewards.mean(axis=(1, 2))

  def expected(i, certain):
    return chances(actions, np.where(np.arange(p.size) == i, certain, p)) @ means

  slopes = np.array([expected(i, 1) - expected(i, 0) for i in range(p.size)])
  return p * (1 - p) * slopes


def policies_of(case, logits, actions):
  """What the gates would sow, as a function of all logits."""
  found, start = {}, 0
  for name, positions, units in case.gates:
    size = case.batch * positions * units
    shape = (case.batch, positions, units)
    l, a = (x[start : start + size].reshape(shape) for x in (logits, actions))
    log_p, log_q = jax.nn.log_sigmoid(l), jax.nn.log_sigmoid(-l)
    found[name] = policy.Policy(
      jnp.where(a, log_p, log_q).sum(-1),
      -(jnp.exp(log_p) * log_p + jnp.exp(log_q) * log_q).sum(-1),
      jnp.mean(a, axis=-1, dtype=jnp.float32),
    )
    start += size
  return found


@functools.cache
def gradients(case):
  """`(logits, actions [N, n], rewards, baselines, bonus) -> [N, n]`, of the loss at each vector."""

  def loss(logits, actions, reward, baseline, bonus):
    return policy.loss(policies_of(case, logits, actions), reward, baseline, bonus)

  return jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0, None)))


def problem(case, seed):
  """Logits, causal rewards, chance of every vector, and `gradient(baseline, bonus)` at each."""
  draw = np.random.default_rng(seed)
  logits = draw.normal(0, 1.2, len(case.where))
  rewards = causal_rewards(case, draw)
  actions = actions_of(case)

  def gradient(baseline=0.0, bonus=0.0):
    baselines = np.broadcast_to(baseline, rewards.shape)
    single = (a.astype(np.float32) for a in (logits, actions, rewards, baselines))
    return np.asarray(gradients(case)(*single, bonus), np.float64)

  return logits, rewards, chances(actions, expit(logits)), gradient


@pytest.mark.parametrize('name', CASES)
@given(SEEDS)
@settings(deadline=None, max_examples=8)
def test_expected_gradient_equals_that_of_the_expected_reward(name, seed):
  case = CASES[name]
  logits, rewards, p, gradient = problem(case, seed)
  want = exact_gradient(case, logits, rewards)
  assert p.sum() == pytest.approx(1)
  assert_allclose(-p @ gradient(), want, atol=2e-6)
  assert np.abs(want).max() > 1e-5


@pytest.mark.parametrize('name', CASES)
@given(SEEDS, st.floats(-5, 5))
@settings(deadline=None, max_examples=8)
def test_a_baseline_leaves_the_expected_gradient_as_it_is(name, seed, scale):
  case = CASES[name]
  logits, rewards, p, gradient = problem(case, seed)
  baseline = scale * np.random.default_rng(seed).standard_normal((case.batch, case.length))
  assert_allclose(-p @ gradient(baseline), exact_gradient(case, logits, rewards), atol=5e-6)


@pytest.mark.parametrize('name', CASES)
@given(SEEDS)
@settings(deadline=None, max_examples=8)
def test_rewards_of_the_greedy_actions_as_baseline_lower_the_variance(name, seed):
  case = CASES[name]
  logits, rewards, p, gradient = problem(case, seed)
  greedy = (actions_of(case) == (logits > 0)).all(axis=-1)
  assert greedy.sum() == 1

  def variance(gradients):
    return p @ ((gradients - p @ gradients) ** 2).sum(axis=-1)

  assert variance(gradient(rewards[greedy])) < 0.8 * variance(gradient())


def test_an_action_gets_no_credit_for_earlier_rewards():
  case = CASES['a gate a token']
  logits = np.linspace(-1, 1, 8).astype(np.float32)
  action, p = np.arange(8) % 3 == 0, expit(np.linspace(-1, 1, 8))
  draw = np.random.default_rng(0)
  reward, baseline = draw.normal(-3, 1, (2, 2, 4)).astype(np.float32)
  given = (action[None], reward[None], baseline[None])
  (got,) = gradients(case)(logits, *given, 0.0)
  want = np.empty(8)
  for i, (_, b, l, _) in enumerate(case.where):
    credit = sum(reward[b, t] - baseline[b, t] for t in range(l, 4))
    want[i] = -credit * (action[i] - p[i]) / 8
  assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('name', CASES)
@given(SEEDS, st.floats(0.01, 2))
@settings(deadline=None, max_examples=5)
def test_the_entropy_bonus_pulls_every_probability_to_a_half(name, seed, bonus):
  case = CASES[name]
  logits, rewards, _, gradient = problem(case, seed)
  # dH/dlogit = -logit p (1 - p), whatever is rewarded.
  slope = logits * expit(logits) * expit(-logits) / (case.batch * case.length)
  got = gradient(bonus=bonus) - gradient()
  assert_allclose(got, np.broadcast_to(bonus * slope, got.shape), atol=1e-5)
  assert_allclose(gradient(rewards, bonus), np.broadcast_to(bonus * slope, got.shape), atol=1e-6)


def test_rewards_and_baselines_get_no_gradient():
  case = CASES['two gates a token']
  policies = policies_of(case, jnp.linspace(-1, 1, 6), np.array([1, 0, 1, 0, 0, 1]))
  reward, baseline = jnp.array([[-1.0, 2.0, 0.5]]), jnp.array([[-1.0, 1.0, 3.0]])
  run = jax.jit(jax.grad(policy.loss, argnums=(1, 2)))
  both = run(policies, reward, baseline, 0.1)
  assert not any(g.any() for g in both)


def test_the_mean_over_the_estimators_own_draws_is_the_exact_gradient():
  case, draws = CASES['a gate a sequence beside one a token'], 20_000
  logits, rewards, _, _ = problem(case, 4)
  keys = jax.random.split(jax.random.key(0), draws)
  powers = 1 << np.arange(len(case.where))[::-1]  # the first gate varies slowest

  def loss(logits, key):
    policies, actions, start = {}, [], 0
    for name, positions, units in case.gates:
      key, own = jax.random.split(key)
      size = case.batch * positions * units
      l = logits[start : start + size].reshape(case.batch, positions, units)
      made = ESTIMATORS['reinforce'].decide(l, own, True)
      policies[name] = policy.Policy(
        made.log_prob.sum(-1), made.entropy.sum(-1), made.factor.mean(-1)
      )
      actions.append(made.open.ravel())
      start += size
    reward = jnp.asarray(rewards, jnp.float32)[jnp.concatenate(actions) @ powers]
    return policy.loss(policies, reward, jnp.full_like(reward, -3), 0.0)

  run = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
  got = -np.asarray(run(jnp.asarray(logits, jnp.float32), keys), np.float64)
  want = exact_gradient(case, logits, rewards)
  assert (np.abs(got.mean(0) - want) < 5 * stats.sem(got, axis=0)).all()
  assert np.abs(want).max() > 20 * stats.sem(got, axis=0).max()


def test_a_reward_is_minus_cross_entropy_minus_what_is_open():
  losses = np.array([[1.0, 2.0, 3.0], [0.5, 0.0, 4.0]], np.float32)
  token = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
  heads = np.array([[0.5, 0.25, 1], [0, 0.75, 0.5]], np.float32)
  layer = np.array([[1], [0]], np.float32)
  unused = jnp.zeros(())
  policies = {
    path: policy.Policy(unused, unused, jnp.asarray(opened))
    for path, opened in (('token', token), ('heads', heads), ('layer', layer))
  }
  shares = {'token': 0.5, 'heads': 2.0, 'layer': -0.25, 'another gate': 100.0}
  got = policy.reward(jnp.asarray(losses), policies, jax.tree.map(jnp.float32, shares))
  # A price below zero pays for what is open.
  want = [[-1 - 0.5 - 1 + 0.25, -2 - 0.5 + 0.25, -3 - 0.5 - 2 + 0.25], [-0.5, -1.5, -4 - 0.5 - 1]]
  assert_allclose(got, want, rtol=1e-6)
  assert_allclose(policy.reward(jnp.asarray(losses), {}, {}), -losses)
