"""Learned masks in training steps: learning rate, penalty and budget."""

import functools

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs import cost_report as cost
from sparse_lm.runs.build import build
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.setup import setup

# Plain gradient descent on a head that is not zero: updates are gradients.
PLAIN = {
  'weight__name': 'l0',
  'weight__pattern': 'neuron',
  'model__init': 'gpt2',
  'optimizer__name': 'sgd',
  'optimizer__schedule': 'constant',
  'optimizer__warmup': 0.0,
  'optimizer__weight_decay': 0.0,
  'optimizer__clip': 0.0,
  'optimizer__learning_rate': 0.1,
}


def after_one_step(config):
  """How far the first step moves parameters and logits, and its metrics."""
  run = setup(config)
  state = run.program.init(0, run.target)
  before = jax.device_get(state.trainable)
  state, metrics = run.program.step(0)(state, next(run.data.train_iterator(0)))
  after = jax.device_get(state.trainable)
  return jax.tree.map(lambda a, b: a - b, after, before), jax.device_get(metrics)


def test_a_training_step_moves_logits_by_their_own_rate_and_by_the_price(tiny_config):
  slow, _ = after_one_step(tiny_config(**PLAIN, weight__learned_rate=1.0))
  fast, free = after_one_step(tiny_config(**PLAIN, weight__learned_rate=100.0))
  dear, priced = after_one_step(tiny_config(**PLAIN, weight__learned_rate=100.0, weight__price=5.0))
  name = 'block_0/mlp/neuron'
  moved = {run: found['learned'][name] for run, found in {'s': slow, 'f': fast, 'd': dear}.items()}
  assert moved['f'].shape == (32,) and np.abs(moved['f']).max() > 1e-5
  assert_allclose(moved['f'], 100 * moved['s'], rtol=0.05, atol=1e-5)  # 1.9 keeps 7 decimals
  jax.tree.map(assert_array_equal, fast['params'], slow['params'])
  jax.tree.map(
    functools.partial(assert_allclose, rtol=1e-4, atol=1e-7), dear['params'], fast['params']
  )
  # 32 units of 32 weights each, all open with probability 0.9.
  assert_allclose(moved['d'] - moved['f'], -0.1 * 100 * 5 * 0.9 * 0.1 / 32, rtol=1e-3)
  # Microbatches share the draw of the gates, and the price is paid once.
  split, _ = after_one_step(
    tiny_config(**PLAIN, weight__learned_rate=100.0, weight__price=5.0, train__accumulation=4)
  )
  assert_allclose(split['learned'][name], moved['d'], rtol=1e-3)
  assert free['auxiliary'] == 0
  assert priced['auxiliary'] == pytest.approx(5 * 29 / 32, rel=1e-5)  # 28.8 are expected to be open
  assert priced['density'] == pytest.approx(29 / 32, rel=1e-5)


@pytest.mark.parametrize(('given', 'words'), [
  ({'weight__sparsity': 0.5}, ['config.weight.sparsity=0.5', 'l0', 'config.budget.target']),
  ({'budget__target': 0.2}, ['config.budget.target=0.2', 'below 0.3']),
  ({'weight__name': 'static', 'weight__sparsity': 0.5, 'budget__target': 0.8},
   ['config.budget.target=0.8', 'config.weight.name=l0']),
  ({'weight__pattern': 'neurn'}, ['config.weight.pattern', "did you mean 'neuron'"]),
])  # fmt: skip
def test_a_bad_config_is_one_line_that_says_what_is_valid(given, words, tiny_config):
  with pytest.raises(UserError) as refused:
    build(tiny_config(**{'weight__name': 'l0', **given}), 23)
  message = str(refused.value)
  assert '\n' not in message and all(word in message for word in words), message


def test_the_floor_of_a_budget_is_what_no_gate_can_skip(tiny_config):
  # Of 4096 FLOPs of kernels, 1024 of attention and 32 for each of 23 characters, the last two.
  floor = (1024 + 736) / (4096 + 1024 + 736)
  build(tiny_config(weight__name='l0', budget__target=floor + 1e-3), 23)
  with pytest.raises(UserError, match=rf'below {floor:.3f}'):
    build(tiny_config(weight__name='l0', budget__target=floor - 1e-3), 23)
  # Neurons alone: the projections of attention cannot be skipped either.
  floor = (2048 + 1024 + 736) / (4096 + 1024 + 736)
  own = {'weight__name': 'l0', 'weight__pattern': 'neuron'}
  build(tiny_config(**own, budget__target=floor + 1e-3), 23)
  with pytest.raises(UserError, match=rf'below {floor:.3f}'):
    build(tiny_config(**own, budget__target=floor - 1e-3), 23)


@pytest.mark.parametrize(
  'pattern',
  [
    'neuron',
    pytest.param('2:4', marks=pytest.mark.slow),
    pytest.param('unstructured', marks=pytest.mark.slow),
    pytest.param('block:4', marks=pytest.mark.slow),
  ],
)
def test_a_budget_brings_training_and_evaluation_to_its_target(pattern, tiny_config):
  config = tiny_config(
    weight__name='l0',
    weight__pattern=pattern,
    data__batch=16,
    optimizer__learning_rate=0.02,
    optimizer__warmup=0.0,
    budget__target=0.8,
    budget__weight=10.0,
    train__steps=150,
  )
  run = setup(config)
  state = run.program.init(0, run.target)
  batches, fractions = run.data.train_iterator(0), []
  for step in range(150):
    state, metrics = run.program.step(step)(state, next(batches))
    fractions.append(float(metrics['flops_fraction']))
  assert fractions[0] > 0.9 and np.mean(fractions[-10:]) == pytest.approx(0.8, abs=0.05)
  params, masks = run.program.finalize(state)
  ran = cost.report(run.program, run.target, masks)['flops_forward_ratio']
  assert ran == pytest.approx(0.8, abs=0.05)
  # What is priced at the last weights is what is evaluated.
  _, density = run.program.method.effective(state.trainable, state.sparse, 'train', 150, None)
  assert float(run.program.costs.fraction(density, {})) == pytest.approx(ran, abs=1e-4)
  closed = sum(int((~mask).sum()) for mask in tree.named(masks).values())
  assert closed > 100
  # What evaluation runs has learned the text too: a guess costs ln(vocab).
  loss = evaluate(run, params, state.model_state)['val_loss']
  assert loss < 0.8 * np.log(run.data.tokenizer.vocab_size)
