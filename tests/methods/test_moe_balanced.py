"""Small experts, balanced by a bias, beside shared ones: against loops in NumPy."""

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
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.layers.after_step import UPDATES, updated
from sparse_lm.model import lm, plans
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.setup import setup

# 18 experts of 4 units, of which a token visits 3, and two shared ones.
SMALL = mixture('moe_balanced', split=3, shared=2)
COUNT, RATE = 3 * EXPERTS, 0.25


def scores(logits):
  return 1 / (1 + np.exp(-np.float64(logits)))


def chosen(score, bias, visits):
  return np.argsort(-(score + bias), axis=-1, kind='stable')[:, :visits]


def load_of(score, bias, visits):
  return np.bincount(chosen(score, bias, visits).ravel(), minlength=score.shape[-1])


def expected(variables, x_TxD, visits, normalise):
  params = variables['params']
  score = scores(np.float64(x_TxD) @ params['router']['kernel'])
  index = chosen(score, variables['router']['bias'], visits)
  weight = np.zeros(score.shape)
  np.put_along_axis(weight, index, np.take_along_axis(score, index, -1), -1)
  if normalise:
    weight /= weight.sum(-1, keepdims=True)
  return by_loop(params, np.float64(x_TxD), weight), weight, score


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize(
  ('normalise', 'shared', 'executor'), [(True, 2, 'sort'), (False, 0, 'sort'), (True, 0, 'einsum')]
)
def test_the_layer_equals_a_loop_in_which_the_bias_chooses_and_the_score_weights(
  normalise, shared, executor, mode
):
  module = SMALL.clone(normalise=normalise, shared=shared, executor=executor)
  variables, x = numbers(module, 1)
  y, after = applied(module, mode)(variables, x)
  want, weight, score = expected(variables, x.reshape(-1, WIDTH), 3, normalise)
  assert_allclose(y.reshape(want.shape), want, rtol=1e-4, atol=1e-4)
  # The bias has changed some choices, or nothing is shown of it.
  assert (chosen(score, 0, 3) != chosen(score, variables['router']['bias'], 3)).any()
  load = (weight > 0).sum(0)
  assert_allclose(after['stats']['load'], load / load.sum(), rtol=1e-6)
  assert_allclose(after['stats']['max_violation'], load.max() / load.mean() - 1, rtol=1e-5)
  # A forward pass leaves the bias alone, and evaluation does not even ask for an update.
  assert_array_equal(after['router']['bias'], variables['router']['bias'])
  assert (UPDATES in after) == (mode == 'train')


def test_one_token_that_is_decoded_equals_the_loop():
  variables, x = numbers(SMALL, 2, (1, 1, WIDTH))
  y, after = applied(SMALL, 'decode')(variables, x)
  assert_allclose(y[0], expected(variables, x[0], 3, True)[0], rtol=1e-4, atol=1e-4)
  assert UPDATES not in after


def test_without_a_bias_the_largest_scores_are_chosen_and_no_gradient_reaches_a_bias():
  variables, x = numbers(SMALL, 3)
  score = scores(x.reshape(-1, WIDTH) @ variables['params']['router']['kernel'])
  variables['router']['bias'] = np.zeros(COUNT, np.float32)
  _, after = applied(SMALL, 'train')(variables, x)
  assert_array_equal(after[UPDATES]['bias'].total, load_of(score, 0, 3))

  @jax.jit
  @jax.grad
  def gradient(variables):
    return jnp.sum(SMALL.apply(variables, x, 'train') ** 2)

  found = gradient(variables)
  assert not np.asarray(found['router']['bias']).any()
  assert np.abs(found['params']['router']['kernel']).max() > 1e-3


@pytest.fixture(scope='module')
def trained(tiny_config, tmp_path_factory):
  """Two layers, four steps, from a skewed bias: the same batches at once and in two microbatches."""
  fields = {'mlp__name': 'moe_balanced', 'mlp__rate': RATE, 'model__layers': 2, 'mlp__experts': 4}
  runs = [setup(tiny_config(**fields, **SGD, train__accumulation=n)) for n in (1, 2)]
  start = runs[0].program.init(0, runs[0].target)
  skew = jax.tree.map(lambda b: 0.3 * jnp.linspace(0, 1, b.size) ** 2, start.model_state)
  start = jax.device_get(start.replace(model_state=skew))
  text = runs[0].data.train_iterator(0)
  batches = [next(text) for _ in range(4)]
  return runs, batches, [steps(run, batches, start) for run in runs]


def test_the_bias_moves_once_a_step_by_the_sign_whatever_the_microbatches(trained):
  runs, batches, ((states, _), (split, _)) = trained
  model, moved = runs[0].program.model, 0
  for before, after, tokens in zip(states, states[1:], batches):
    for layer, logits in router_logits(model, before, tokens).items():
      block, slot = layer.split('/')
      bias = before.model_state['router'][block][slot]['bias']
      load = load_of(scores(logits), bias, 4)
      assert load.sum() == tokens[:, 1:].size * 4
      want = bias + RATE * np.sign(load.mean() - load)
      moved += (want != bias).sum()
      assert_allclose(after.model_state['router'][block][slot]['bias'], want, rtol=1e-6)
  assert moved > 50
  for one, two in zip(states, split):
    jax.tree.map(assert_array_equal, one.model_state, two.model_state)


def test_a_step_reads_the_bias_of_before_it_in_every_microbatch(trained):
  runs, batches, found = trained
  model = runs[0].program.model
  for states, logged in found:
    for before, metrics, tokens in zip(states, logged, batches):
      variables = {'params': before.trainable['params'], **before.model_state}
      logits = applied_model(model)(variables, tokens[:, :-1])
      nats = -np.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
      assert_allclose(metrics['loss'], nats.mean(), rtol=1e-5)


def applied_model(model):
  return jax.jit(lambda variables, tokens: model.apply(variables, tokens))


def test_the_bias_is_state_that_no_optimizer_knows_and_a_checkpoint_holds(trained, tmp_path):
  runs, _, ((states, _), _) = trained
  run, last = runs[0], states[-1]
  for part in (last.trainable, last.opt_state):
    assert not [path for path in tree.named(part) if 'mlp/bias' in path]
  assert set(tree.named(last.model_state)) == {f'router/block_{i}/mlp/bias' for i in (0, 1)}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(last, run.data.train_iterator(0))
  restored = checkpoints.restore(run.program.init(1, run.target))
  checkpoints.close()
  jax.tree.map(assert_array_equal, restored.model_state, last.model_state)


def test_the_bias_balances_a_skewed_router():
  variables, x = numbers(SMALL, 4, (16, 8, WIDTH))
  # Six of the experts are far ahead of the others for all tokens.
  x[..., 0] = 1
  variables['params']['router']['kernel'][0] = np.where(np.arange(COUNT) < 6, 2, -1)
  state = {'router': {'bias': np.zeros(COUNT, np.float32)}}
  module = SMALL.clone(rate=0.02)

  @jax.jit
  def step(state):
    _, after = module.apply({**variables, **state}, x, 'train', mutable=[UPDATES, 'stats'])
    return updated(state, after[UPDATES]), after['stats']['max_violation']

  violations = []
  for _ in range(80):
    state, violation = step(state)
    violations.append(float(violation))
  assert violations[0] > 2 and np.mean(violations[-10:]) < 0.5
  # The mean of the biases hardly moves: as many go up as down.
  assert np.ptp(state['router']['bias']) > 0.3


def test_shared_experts_are_charged_for_every_token_and_routed_ones_for_their_visits(tiny_config):
  fields = {'mlp__split': 2, 'mlp__k': 3, 'mlp__shared': 5}
  ledger = plans.ledger(lm.from_config(tiny_config(mlp__name='moe_balanced', **fields), 11), 16)
  flops = {path.removeprefix('block_0/mlp/'): m for path, m in ledger.items() if '/mlp/' in path}
  assert flops['experts/up/linear'].flops == 2 * (3 * 2) * 16 * (32 // 2)
  assert flops['shared/up/linear'].flops == 2 * 5 * 16 * (32 // 2)
  assert flops['experts/up/linear'].gates and not flops['shared/up/linear'].gates


@pytest.mark.parametrize(
  ('fields', 'value', 'valid'),
  [
    ({'k': 7}, 'k=7', '1 to the number of experts, 6'),
    ({'split': 5}, 'split=5', 'a divisor of the hidden units of an expert, 12'),
    ({'split': 4, 'hidden': 6}, 'split=4', 'a divisor of the hidden units of an expert, 6'),
  ],
)
def test_bad_fields_are_refused_in_one_line(fields, value, valid):
  with pytest.raises(UserError) as refused:
    mixture('moe_balanced', **fields).check()
  assert f'config.mlp.{value}' in str(refused.value) and f'valid: {valid}' in str(refused.value)
  assert '\n' not in str(refused.value)
