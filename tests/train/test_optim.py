"""Optimizers under changing masks, their schedules, decay and averages."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose, assert_array_equal

from configs import base
from sparse_lm.core import distribution
from sparse_lm.core import units as pattern
from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.model.plans import plan_of
from sparse_lm.model.slots import MethodConfig
from sparse_lm.plan import record
from sparse_lm.runs.build import build
from sparse_lm.train import optim
from sparse_lm.train.objective import Objective
from sparse_lm.train.step import Program
from sparse_lm.weights import rewire

STEPS = 14
ALL = [*optim.TESTED, *optim.DENSE_ONLY]
# A rate at which momentum and decay visibly move whatever they are let move.
SETTINGS = {
  'learning_rate': 0.03,
  'warmup': 0.2,
  'final': 0.1,
  'weight_decay': 0.5,
  'clip': 0.1,
  'ema': 0.8,
  'steps': STEPS,
}


def optimizer(name, **overrides):
  return optim.Optimizer(**{**base.get_config().optimizer, **SETTINGS, **overrides, 'name': name})


@dataclasses.dataclass(frozen=True)
class ToySpec:
  context: int = 6
  layers: int = 1
  vocab: int = 7
  biases: tuple[str, ...] = ()


class Toy(nn.Module):
  """The smallest model with a masked matrix: its 24 programs compile in the time of a few LMs."""

  spec: ToySpec
  site: MethodConfig = MethodConfig('site', 'none')

  @nn.compact
  def __call__(self, tokens_BxL, mode='eval', progress=None, readout=False):
    init = nn.initializers.normal(0.5)
    x_BxLxD = self.param('embed', init, (self.spec.vocab, 8))[tokens_BxL]
    x_BxLxD = record.matmul(x_BxLxD, self.path, 'lookup', 0, kernel='embed')
    bias = self.param('bias', nn.initializers.zeros, (12,))
    h_BxLxF = x_BxLxD @ self.param('up', init, (8, 12)) + bias
    h_BxLxF = jnp.tanh(record.matmul(h_BxLxF, self.path, 'up', 2 * 8 * h_BxLxF.size, kernel='up'))
    logits_BxLxV = h_BxLxF @ self.param('head', init, (12, self.spec.vocab))
    flops = 2 * 12 * logits_BxLxV.size
    return record.matmul(logits_BxLxV, self.path, 'head', flops, kernel='head')


def tokens(step):
  return np.random.default_rng(step).integers(7, size=(4, 7)).astype(np.int32)


def toy_program(optimizer_name, method_name, **fields):
  method = slots.method('weight', method_name)(total_steps=STEPS, **fields)
  program = Program(Objective(Toy(ToySpec()), method), optimizer(optimizer_name))
  params = plan_of(program.model).params
  return program, distribution.targets(params, 0.6, 'uniform', ('embed', 'bias'), method.units)


def sorted_topk(scores, counts):
  ranks = (jnp.argsort(jnp.argsort(-array, axis=None)).reshape(array.shape) for array in scores)
  return [rank < k for rank, k in zip(ranks, counts)]


@pytest.fixture(scope='module')
def toy_gradients():
  program, _ = toy_program('sgd', 'none')
  return jax.jit(program._gradients)  # no part of an optimizer or a method


@pytest.fixture
def operation_by_operation(toy_gradients, monkeypatch):
  """Runs steps without jit: compiling 24 programs would take ten times as long."""

  def gradients(_, *arguments):
    with jax.disable_jit(False):
      return toy_gradients(*arguments)

  # Which weights are chosen is tested elsewhere; a bisection is slow without jit.
  monkeypatch.setattr(pattern, 'topk_masks', sorted_topk)
  monkeypatch.setattr(rewire, 'topk_masks', sorted_topk)
  monkeypatch.setattr(Program, '_gradients', gradients)
  with jax.disable_jit():
    yield


# Each optimizer with one method and each method with one optimizer; `make test-slow` runs all pairs.
@pytest.mark.parametrize(
  ('name', 'method'),
  [
    (name, method)
    if name == 'adamw' or method == 'magnitude'
    else pytest.param(name, method, marks=pytest.mark.slow)
    for name in optim.TESTED
    for method in ('rigl', 'set', 'magnitude')
  ],
)
@pytest.mark.usefixtures('operation_by_operation')
def test_dead_weights_stay_dead(name, method):
  program, target = toy_program(name, method, period=2, end=0.9)
  state = program.init(0, target)
  changes = 0
  for step in range(STEPS):
    before = jax.device_get(state.sparse.masks)
    state, _ = program.step(step)(state, tokens(step))
    masks = jax.device_get(state.sparse.masks)
    for leaf in ('up', 'head'):
      dead = ~masks[leaf]
      for held in (state.trainable, state.ema):
        assert not np.asarray(held['params'][leaf])[dead].any(), (step, leaf)
      for held in moments(state):  # AdaBelief adds 1e-16 to every second moment
        assert np.abs(np.asarray(held['params'][leaf])[dead]).max(initial=0) < 1e-12, (step, leaf)
      changes += int((before[leaf] != masks[leaf]).sum())
    if program.method.due(step):
      for held in moments(state):
        for leaf in ('up', 'head'):
          assert not np.asarray(held['params'][leaf])[before[leaf] != masks[leaf]].any()
  assert changes and (~masks['up']).sum() == 58  # 0.6 of 96 weights


@pytest.mark.usefixtures('operation_by_operation')
def test_what_set_drops_and_grows_again_starts_anew_in_weights_moments_and_average():
  program, target = toy_program('adamw', 'set', period=4, end=0.9, drop_fraction=0.9)
  state = program.init(0, target)
  for step in range(5):
    before = jax.device_get(state)
    state, _ = program.step(step)(state, tokens(step))
  mask = np.asarray(before.sparse.masks['up'] & state.sparse.masks['up'])
  restarted = mask & (np.asarray(state.trainable['params']['up']) == 0)
  assert 5 < restarted.sum() < mask.sum()
  for held in (state.ema, *moments(state)):
    alive = np.asarray(held['params']['up']) != 0
    assert not alive[restarted].any() and alive[mask & ~restarted].all()
  assert len(moments(state)) == 2 and np.asarray(before.ema['params']['up'])[restarted].all()


def moments(state):
  """Every tree in the optimizer's state that mirrors the parameters, found by its structure."""
  like = jax.tree.structure(state.trainable)

  def is_moment(node):
    return jax.tree.structure(node) == like

  return [m for m in jax.tree.leaves(state.opt_state, is_leaf=is_moment) if is_moment(m)]


@pytest.mark.parametrize('name', optim.TESTED)
def test_zero_moments_zeroes_the_changed_entries_alone(name):
  draw = np.random.default_rng(0)
  shapes = {'masked': (5, 7), 'dense': (6, 3), 'vector': (4,)}
  params, grads = ({k: draw.normal(size=s).astype('f') for k, s in shapes.items()} for _ in 'ab')
  tx = optimizer(name).transform()
  state = tx.init(params)
  for _ in range(3):
    _, state = tx.update(grads, state, params)
  flags = draw.random((5, 7)) < 0.4
  zeroed = optim.zero_moments(tx, state, {'masked': flags, 'dense': None, 'vector': None})
  before, after = jax.tree.leaves(state), jax.tree.leaves(zeroed)
  assert jax.tree.structure(state) == jax.tree.structure(zeroed)
  found = 0
  for old, new in zip(before, after):
    if np.shape(old) == (5, 7):
      found += 1
      assert np.asarray(old).all()  # one that is zero already would prove nothing
      assert_array_equal(new, np.where(flags, 0, old))
    else:
      assert_array_equal(new, old)
  assert found >= 1


@pytest.mark.parametrize('name', optim.DENSE_ONLY)
def test_untested_optimizer_is_refused_with_a_mask_and_trains_without(name, tiny_config):
  config = tiny_config(optimizer__name=name, weight__name='static', weight__sparsity=0.5)
  with pytest.raises(UserError) as refused:
    build(config, 20)
  line = str(refused.value)
  assert 'config.optimizer.name' in line and repr(name) in line and '\n' not in line
  assert all(valid in line for valid in optim.TESTED)
  build(tiny_config(optimizer__name=name), 20)

  program, _ = toy_program(name, 'none')
  state = program.init(0, jax.tree.map(lambda _: None, plan_of(program.model).params))
  losses = []
  for _ in range(STEPS):
    state, metrics = program.step(0)(state, tokens(0))
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize('warmup', [0.0, 0.25])
@pytest.mark.parametrize('schedule', optim.SCHEDULES)
def test_schedule_matches_its_closed_form(schedule, warmup):
  steps, peak, final = 40, 0.5, 0.2
  rate = optimizer(
    'sgd', schedule=schedule, warmup=warmup, steps=steps, learning_rate=peak, final=final
  ).rate()
  ramp = round(warmup * steps)

  def expected(step):
    if step < ramp:  # from a share of the peak at step 0 to the peak at step `ramp`
      return peak / ramp + (peak - peak / ramp) * step / ramp
    progress = (step - ramp) / (steps - ramp)
    share = {
      'cosine': (1 + math.cos(math.pi * progress)) / 2,
      'linear': 1 - progress,
      'constant': 1.0,
    }[schedule]
    return peak * (final + (1 - final) * share)

  assert_allclose(
    [rate(s) for s in range(steps + 1)], [expected(s) for s in range(steps + 1)], 1e-5
  )


@pytest.mark.parametrize('name', ALL)
def test_decay_is_decoupled_and_touches_matrices_only(name):
  draw = np.random.default_rng(0)
  params = {'matrix': draw.normal(size=(6, 4)).astype('f'), 'scale': np.ones(4, 'f')}
  tx = optimizer(name, schedule='constant', warmup=0.0, clip=0.0).transform()
  # Without a gradient, decay is all that is left of an update.
  updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
  rate, decay = SETTINGS['learning_rate'], SETTINGS['weight_decay']
  assert_allclose(updates['matrix'], -rate * decay * params['matrix'], rtol=1e-5, atol=1e-8)
  assert_array_equal(updates['scale'], 0)


@pytest.mark.parametrize('name', optim.TESTED)
def test_what_a_method_learns_moves_at_its_own_rate_and_does_not_decay(name):
  draw = np.random.default_rng(0)
  shapes = {'params': {'w': (6, 4)}, 'learned': {'w': (6, 4), 'row': (6, 1), 'unit': (5,)}}
  is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
  trainable, grads = (
    jax.tree.map(lambda s: draw.normal(size=s).astype('f'), shapes, is_leaf=is_shape) for _ in 'ab'
  )

  def first_update(grads, rate):
    tx = optimizer(
      name, schedule='constant', warmup=0.0, clip=0.0, learned_rates=(('', rate),)
    ).transform()
    return tx.update(grads, tx.init(trainable), trainable)[0]

  slow, fast = first_update(grads, 1.0), first_update(grads, 10.0)
  for key, update in slow['learned'].items():
    assert np.abs(update).min() > 0
    assert_allclose(fast['learned'][key], 10 * update, rtol=1e-6)
  assert_array_equal(fast['params']['w'], slow['params']['w'])
  idle = first_update(jax.tree.map(np.zeros_like, grads), 10.0)
  assert np.abs(idle['params']['w']).min() > 0  # decay acts on the weights
  assert not any(np.asarray(update).any() for update in idle['learned'].values())


def test_clip_bounds_the_global_norm():
  grads = {'a': np.full((3, 4), 2.0, 'f'), 'b': np.full(5, -1.0, 'f')}
  plain = {'schedule': 'constant', 'warmup': 0.0, 'momentum': 0.0, 'weight_decay': 0.0}
  norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
  for clip, scale in ((0.0, 1.0), (0.1, 0.1 / norm), (100.0, 1.0)):
    tx = optimizer('sgd', clip=clip, **plain).transform()
    updates, _ = tx.update(grads, tx.init(grads), grads)
    assert_allclose(updates['a'], -0.03 * scale * grads['a'], rtol=1e-5)
    assert_allclose(updates['b'], -0.03 * scale * grads['b'], rtol=1e-5)


def test_ema_follows_its_recursion():
  program, target = toy_program('adamw', 'rigl', period=3)
  state = program.init(0, target)
  average = jax.device_get(state.trainable['params'])
  for step in range(8):
    state, _ = program.step(step)(state, tokens(step))
    now, masks = jax.device_get((state.trainable['params'], state.sparse.masks))
    for leaf, weights in now.items():
      average[leaf] = 0.8 * average[leaf] + 0.2 * weights
      if masks[leaf] is not None:  # what died is gone from the average too
        average[leaf] = average[leaf] * masks[leaf]
      assert_allclose(state.ema['params'][leaf], average[leaf], rtol=1e-5, atol=1e-7)
  params, _ = program.finalize(state)
  assert_allclose(params['up'], average['up'], rtol=1e-5, atol=1e-7)


def test_rate_reaches_the_update():
  # A transformation that ignored the schedule would pass every test of `rate`.
  tx = optimizer('sgd', momentum=0.0, weight_decay=0.0, clip=0.0).transform()
  params = {'w': np.ones((2, 2), 'f')}
  state = tx.init(params)
  for step in range(STEPS):
    updates, state = tx.update(params, state, params)
    assert_allclose(-updates['w'][0, 0], optimizer('sgd').rate()(step), rtol=1e-6)
