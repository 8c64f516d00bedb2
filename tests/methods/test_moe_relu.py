"""Experts whose gates are a ReLU's, and the price that holds them at a rate: against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixture_layer import (
  EXPERTS,
  SGD,
  WIDTH,
  applied,
  by_loop,
  mixture,
  numbers,
  router_logits,
  steps,
)
from numpy.testing import assert_allclose

from sparse_lm.core.errors import UserError
from sparse_lm.layers.after_step import UPDATES, updated
from sparse_lm.model import lm, plans
from sparse_lm.plan import cost
from sparse_lm.runs.setup import setup

RELU = mixture('moe_relu', k=2, shared=1)


def gates_of(params, x):
  return np.maximum(np.float64(x).reshape(-1, WIDTH) @ params['router']['kernel'], 0)


@pytest.mark.parametrize(
  ('mode', 'shared', 'executor'),
  [('train', 1, 'sort'), ('train', 0, 'einsum'), ('eval', 0, 'sort'), ('decode', 1, 'sort')],
)
def test_the_layer_equals_a_loop_over_the_gates_that_are_open(mode, shared, executor):
  module = RELU.clone(shared=shared, executor=executor)
  # A single token that is decoded takes a way of its own.
  variables, x = numbers(module, 1, (1, 1, WIDTH) if mode == 'decode' else (3, 8, WIDTH))
  y, after = applied(module, mode)(variables, x)
  gate = gates_of(variables['params'], x)
  visits = (gate > 0).sum(-1)
  want = by_loop(variables['params'], np.float64(x.reshape(-1, WIDTH)), gate)
  assert_allclose(y.reshape(want.shape), want, rtol=1e-4, atol=1e-4)
  assert_allclose(after['gates']['active'].ravel(), visits / EXPERTS, rtol=1e-6)
  assert mode == 'decode' or (visits.min() <= 1 and visits.max() >= EXPERTS - 1)
  assert after['stats']['closed'] == 0 and after['stats']['drop_rate'] == 0
  assert (UPDATES in after) == ('losses' in after) == (mode == 'train')


def test_the_penalty_and_its_gradient_equal_finite_differences_with_constant_fractions():
  variables, x = numbers(RELU, 2)
  price = variables['router']['price'] = np.float32(0.3)
  kernel = np.float64(variables['params']['router']['kernel'])
  fraction = (gates_of(variables['params'], x) > 0).mean(0)

  def by_hand(kernel):
    gate = gates_of({'router': {'kernel': kernel}}, x)
    return price * EXPERTS * (gate.mean(0) * fraction).sum() / RELU.k

  @jax.jit
  @jax.value_and_grad
  def penalty(kernel):
    params = {**variables['params'], 'router': {'kernel': kernel}}
    _, sown = RELU.apply({**variables, 'params': params}, x, 'train', mutable=['losses'])
    return sown['losses']['gates']

  value, slope = penalty(jnp.float32(kernel))
  assert_allclose(value, by_hand(kernel), rtol=1e-5)
  want = np.zeros(kernel.shape)
  for place in np.ndindex(kernel.shape):
    step = np.zeros(kernel.shape)
    step[place] = 1e-6
    want[place] = (by_hand(kernel + step) - by_hand(kernel - step)) / 2e-6
  assert_allclose(slope, want, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope='module')
def trained(tiny_config):
  """Two layers, three steps: the same batches at once and in two microbatches."""
  fields = {'mlp__name': 'moe_relu', 'mlp__k': 4, 'model__layers': 2, 'model__init': 'gpt2'}
  runs = [setup(tiny_config(**fields, **SGD, train__accumulation=n)) for n in (1, 2)]
  start = jax.device_get(runs[0].program.init(0, runs[0].target))
  text = runs[0].data.train_iterator(0)
  batches = [next(text) for _ in range(3)]
  return runs, batches, [steps(run, batches, start) for run in runs]


def test_one_price_for_all_layers_moves_once_a_step_by_all_gates(trained):
  runs, batches, found = trained
  for states, _ in found:
    price = 1e-8
    for before, after, tokens in zip(states, states[1:], batches):
      logits = router_logits(runs[0].program.model, before, tokens)
      closed = np.mean([one <= 0 for one in logits.values()])
      assert len(logits) == 2 and abs(closed - 0.5) > 1e-3
      price *= 1.2 ** np.sign(0.5 - closed)
      for block in ('block_0', 'block_1'):
        assert_allclose(after.model_state['router'][block]['mlp']['price'], price, rtol=1e-5)


def test_the_controller_holds_a_plant_at_its_target():
  """A plant whose gates close the more the dearer they are, some steps late."""
  _, sown = applied(RELU, 'train')(*numbers(RELU, 3))
  rule = sown[UPDATES]['price'].rule
  target = 1 - 2 / EXPERTS
  step = jax.jit(lambda state, counts: updated(state, {'price': sown_with(sown, counts)}))
  state, sparsity, seen = {'router': {'price': jnp.float32(1e-8)}}, 0.3, []
  for _ in range(200):
    state = step(state, (jnp.int32(1000 * EXPERTS * (1 - sparsity)), jnp.int32(1000)))
    price = float(state['router']['price'])
    settles = 1 / (1 + (1e-3 / price) ** 0.3)  # half of the gates are closed at a price of 1e-3
    sparsity += 0.2 * (settles - sparsity)
    seen.append(sparsity)
  assert seen[40] < 0.4  # nothing is felt of the price at first
  assert np.abs(np.array(seen[-80:]) - target).max() < 0.05
  # At the target itself it rests; without bounds it would become zero, and stay.
  assert float(rule(jnp.float32(0.5), (jnp.int32(2000), jnp.int32(1000)))) == 0.5
  assert float(rule(jnp.float32(1e-12), (jnp.int32(0), jnp.int32(6)))) > 0


def sown_with(sown, counts):
  return sown[UPDATES]['price'].replace(total=counts)


@pytest.mark.parametrize('shared', [0, 1])
def test_a_closed_layer_returns_only_its_shared_part_and_reports_it(shared):
  module = RELU.clone(shared=shared)
  variables, x = numbers(module, 4)
  variables['params']['router']['kernel'] = np.full((WIDTH, EXPERTS), -1, np.float32)
  variables['router']['price'] = np.float32(0.5)
  x = np.abs(x)
  for mode in ('train', 'eval', 'decode'):
    y, after = applied(module, mode)(variables, x)
    want = by_loop(variables['params'], np.float64(x.reshape(-1, WIDTH)), np.zeros((24, EXPERTS)))
    assert_allclose(y.reshape(want.shape), want, rtol=1e-4, atol=1e-4)
    assert shared or not np.asarray(y).any()
    stats = after['stats']
    assert stats['closed'] == stats['dead_experts'] == 1 and stats['max_violation'] == 0
    assert not np.asarray(after['gates']['active']).any()
  _, after = applied(module, 'train')(variables, x)
  moved = updated({'router': variables['router']}, after[UPDATES])
  assert_allclose(moved['router']['price'], variables['router']['price'] / 1.2, rtol=1e-6)


def test_reported_flops_are_the_measured_fraction_of_the_routed_part(tiny_config):
  fields = {'mlp__name': 'moe_relu', 'mlp__k': 2, 'mlp__experts': 8, 'mlp__shared': 1}
  ledger = plans.ledger(lm.from_config(tiny_config(**fields), 11), 16)
  two = 2 * 16 * 32 * 2  # both matrices of one expert
  whole = cost.forward_flops(ledger, {}, {'block_0/mlp': 1.0})
  assert whole - cost.forward_flops(ledger, {}, {'block_0/mlp': 0.375}) == 5 * two
  assert (
    whole - cost.forward_flops(ledger, {}) == 6 * two
  )  # as planned, before anything is measured
  assert ledger['block_0/mlp/shared/up/linear'].gates == ()


def test_k_above_the_number_of_experts_is_refused_in_one_line():
  with pytest.raises(UserError, match=r'^config\.mlp\.k=7 .*valid: 1 to the number of experts, 6$'):
    mixture('moe_relu', k=7).check()
