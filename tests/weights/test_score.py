"""What a config chooses beside the score: schedules, and each way to apply the mask, against NumPy."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits

MAGNITUDE = slots.method('weight', 'magnitude')
KEY = jax.random.key(0)
TARGET = {'w': jnp.float32(0.4), 'b': None}
PARAMS = {
  'w': jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32),
  'b': jnp.ones(5),
}


@dataclasses.dataclass(frozen=True)
class Learned(ScoredMethod):
  """Scores that are learned, which start at a draw."""

  traits: ClassVar[Traits] = Traits(learns_scores=True)

  def scores(self, trainable, signals):
    return trainable['learned']

  def first_scores(self, key, params):
    return jax.tree.map(lambda w: jax.random.normal(key, w.shape), params)


@dataclasses.dataclass(frozen=True)
class Saliency(ScoredMethod):
  """The magnitude of weight times gradient."""

  traits: ClassVar[Traits] = Traits(needs=('grads',))

  def scores(self, trainable, signals):
    return jax.tree.map(lambda w, g: jnp.abs(w * g), trainable['params'], signals['grads'])


@dataclasses.dataclass(frozen=True)
class OfOutputs(ScoredMethod):
  """A score for each output, which lacks the axis of the inputs."""

  traits: ClassVar[Traits] = Traits()

  def scores(self, trainable, signals):
    return jax.tree.map(lambda w: jnp.abs(w).sum(axis=0), trainable['params'])


def largest(scores, count):
  order = np.argsort(-np.asarray(scores), axis=None, kind='stable')
  mask = np.zeros(scores.size, bool)
  mask[order[:count]] = True
  return mask.reshape(scores.shape)


def seen_and_gradient(method, sparse, trainable):
  """What the model sees, and the gradient where that of what it sees is G."""
  outer = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), jnp.float32)

  def loss(trainable):
    seen, density = method.effective(trainable, sparse, 'train', jnp.int32(50), None)
    return jnp.sum(seen['w'] * outer), (seen, density)

  gradient, (seen, density) = jax.jit(jax.grad(loss, has_aux=True))(trainable)
  return jax.tree.map(np.asarray, seen), density, gradient, np.asarray(outer)


AT_ONCE = {'schedule': 'at_once', 'start': 0.0}


@pytest.mark.parametrize('apply', ['straight_through', 'soft'])
def test_dropped_weights_are_zero_in_the_model_and_get_its_gradient(apply):
  method = MAGNITUDE(total_steps=100, apply=apply, **AT_ONCE)
  trainable, sparse = method.init(KEY, PARAMS, TARGET)
  assert sparse.masks == {'w': None, 'b': None} and trainable['learned'] == {}
  seen, density, gradient, outer = seen_and_gradient(method, sparse, trainable)
  w = np.asarray(PARAMS['w'])
  mask = largest(np.abs(w), 12)
  want = np.where(mask, w, 0)
  if apply == 'soft':  # the threshold is the 13th largest magnitude
    want = np.sign(w) * np.maximum(np.abs(w) - np.sort(np.abs(w).ravel())[-13], 0)
    assert (np.abs(want[mask]) < np.abs(w[mask])).all()
  assert_allclose(seen['w'], want, rtol=1e-5, atol=1e-7)
  assert_array_equal(seen['w'] != 0, mask)
  assert_array_equal(gradient['params']['w'], outer)
  assert float(density['w']) == pytest.approx(12 / 30) and density['b'] is None
  params, masks = method.finalize(trainable, sparse, jnp.int32(100))
  assert_array_equal(masks['w'], mask)
  assert_allclose(params['w'], want, rtol=1e-5, atol=1e-7)
  assert method.backward_density(0.4, 0) == 1.0 and not any(map(method.due, range(100)))


def test_a_soft_mask_moves_with_the_weights_without_a_jump():
  method = MAGNITUDE(total_steps=100, apply='soft', **AT_ONCE)
  _, sparse = method.init(KEY, PARAMS, TARGET)
  flat = np.sort(np.abs(np.asarray(PARAMS['w'])).ravel())
  place = np.unravel_index(np.argsort(-np.abs(PARAMS['w']), axis=None)[11], (6, 5))
  seen = []
  for size in np.linspace(flat[-13] - 1e-3, flat[-13] + 1e-3, 9):  # across the threshold
    w = PARAMS['w'].at[place].set(size)
    seen.append(
      method.effective({'params': PARAMS | {'w': w}, 'learned': {}}, sparse, '', 0, None)[0]['w']
    )
  jumps = [np.abs(np.asarray(b) - np.asarray(a)).max() for a, b in itertools.pairwise(seen)]
  assert max(jumps) < 3e-4  # a hard mask would jump by the threshold
  assert flat[-13] > 0.1


@pytest.mark.parametrize('pattern', ['2:4', 'per_output', 'block:2', 'row'])
def test_a_soft_mask_shrinks_each_unit_by_the_largest_dropped_one_that_it_competes_with(pattern):
  method = MAGNITUDE(total_steps=10, apply='soft', pattern=pattern, **AT_ONCE)
  w = np.random.default_rng(2).normal(size=(8, 6)).astype('f')
  trainable, sparse = method.init(KEY, {'w': jnp.asarray(w)}, {'w': jnp.float32(0.5)})
  seen = np.asarray(method.effective(trainable, sparse, 'train', jnp.int32(3), None)[0]['w'])
  size = np.abs(w).astype(float)
  want = np.zeros_like(size)
  if pattern in ('2:4', 'per_output'):
    height = 4 if pattern == '2:4' else 8
    for top in range(0, 8, height):
      for column in range(6):
        group = size[top : top + height, column]
        threshold = np.sort(group)[height // 2 - 1]
        want[top : top + height, column] = np.maximum(1 - threshold / group, 0)
  else:
    height, width = (2, 2) if pattern == 'block:2' else (1, 6)
    mean = size.reshape(8 // height, height, 6 // width, width).mean(axis=(1, 3))
    threshold = np.sort(mean.ravel())[mean.size // 2 - 1]
    want = np.kron(np.maximum(1 - threshold / mean, 0), np.ones((height, width)))
  assert_allclose(seen, w * want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('apply', ['masked', 'straight_through', 'soft'])
def test_learned_scores_get_the_gradient_of_the_masked_weight_times_the_weight(apply):
  method = Learned(total_steps=100, apply=apply, **AT_ONCE)
  trainable, sparse = method.init(KEY, PARAMS, TARGET)
  scores = np.asarray(trainable['learned']['w'])
  assert sparse.masks['w'] is None and trainable['learned']['b'] is None
  seen, _, gradient, outer = seen_and_gradient(method, sparse, trainable)
  w, mask = np.asarray(PARAMS['w']), largest(scores, 12)
  assert_array_equal(seen['w'] != 0, mask)
  if apply != 'soft':
    assert_array_equal(seen['w'], np.where(mask, w, 0))
  assert_allclose(gradient['learned']['w'], outer * w, rtol=1e-6)
  assert_array_equal(gradient['params']['w'], outer * mask if apply == 'masked' else outer)
  # A score needs all of the gradient, and dropped weights keep their values.
  assert method.backward_density(0.4, 3) == 1.0
  assert_array_equal(method.constrain(trainable, sparse)['params']['w'], w)


@pytest.mark.parametrize('apply', ['masked', 'straight_through'])
def test_a_ramp_at_once_is_dense_before_its_start_and_at_the_target_after_it(apply):
  method = MAGNITUDE(total_steps=40, schedule='at_once', start=0.25, apply=apply)
  trainable, sparse = method.init(KEY, PARAMS, TARGET)
  held = []
  for step in range(40):
    held.append(float(method.effective(trainable, sparse, 'train', jnp.int32(step), None)[1]['w']))
    assert method.density(0.4, step) == pytest.approx(held[-1])
    if method.due(step):
      change = method.update(trainable, sparse, {}, jnp.int32(step), KEY)
      trainable, sparse = change.trainable, change.sparse
  first = 11 if apply == 'masked' else 10  # an update shows in the step after it
  assert held == pytest.approx([1.0] * first + [0.4] * (40 - first))


@pytest.mark.parametrize('apply', ['masked', 'soft'])
def test_scores_of_another_shape_are_refused_by_the_path_of_the_weights(apply):
  method = OfOutputs(total_steps=100, apply=apply, **AT_ONCE)
  trainable, sparse = method.init(KEY, PARAMS, TARGET)
  step = jnp.int32(0)
  with pytest.raises(UserError, match=r'OfOutputs\.scores.*w.*\(5,\); valid: \(6, 5\)'):
    if apply == 'masked':
      method.update(trainable, sparse, {}, step, KEY)
    method.effective(trainable, sparse, 'train', step, None)


def test_scores_may_be_negative():
  @dataclasses.dataclass(frozen=True)
  class Value(ScoredMethod):
    def scores(self, trainable, signals):
      return trainable['params']

  method = Value(total_steps=10, **AT_ONCE)
  trainable, sparse = method.init(KEY, PARAMS, TARGET)
  change = method.update(trainable, sparse, {}, jnp.int32(0), KEY)
  assert_array_equal(change.sparse.masks['w'], largest(np.asarray(PARAMS['w']), 12))
  # And what is dropped stays behind every living weight, however negative that is.
  lower = sparse.replace(masks=change.sparse.masks, target={'w': jnp.float32(0.2), 'b': None})
  moved = {'params': PARAMS | {'w': PARAMS['w'] - 10}, 'learned': {}}
  again = method.update(moved, lower, {}, jnp.int32(0), KEY).sparse.masks['w']
  assert (
    int(again.sum()) == 6 and not (np.asarray(again) & ~np.asarray(change.sparse.masks['w'])).any()
  )


def test_an_update_scores_only_leaves_that_have_all_signals():
  method = Saliency(total_steps=10, **AT_ONCE)
  params = {'a': PARAMS['w'], 'c': PARAMS['w'] * 2, 'b': PARAMS['b']}
  target = {'a': TARGET['w'], 'c': TARGET['w'], 'b': None}
  trainable, sparse = method.init(KEY, params, target)
  gradient = jnp.asarray(np.random.default_rng(3).normal(size=(6, 5)), jnp.float32)
  signals = {'grads': {'a': gradient, 'c': None, 'b': None}}
  change = method.update(trainable, sparse, signals, jnp.int32(0), KEY)
  assert_array_equal(
    change.sparse.masks['a'], largest(np.abs(np.asarray(params['a'] * gradient)), 12)
  )
  assert change.sparse.masks['c'].all() and change.sparse.masks['b'] is None
  assert [step for step in range(10) if method.backward_density(0.4, step)] == [0]


@pytest.mark.parametrize(('fields', 'words'), [
  ({'apply': 'straight_trough'}, ["config.weight.apply 'straight_trough'", "mean 'straight_through'"]),
  ({'schedule': 'cubik'}, ["config.weight.schedule 'cubik'", "mean 'cubic'", 'at_once']),
  ({'start': 0.9}, ['config.weight.end=0.75', 'config.weight.start=0.9']),
])  # fmt: skip
def test_a_bad_choice_is_one_line(fields, words):
  with pytest.raises(UserError) as refused:
    MAGNITUDE(total_steps=10, **fields).check()
  assert '\n' not in str(refused.value) and all(word in str(refused.value) for word in words)


def test_scores_of_signals_need_stored_masks():
  Saliency(total_steps=10).check()
  with pytest.raises(UserError, match=r"config\.weight\.apply='soft'.*valid: masked, .*grads"):
    Saliency(total_steps=10, apply='soft').check()


def test_one_shot_pruning_needs_stored_masks():
  assert MAGNITUDE(total_steps=1).one_shot and Saliency(total_steps=1).one_shot
  MAGNITUDE(total_steps=1).check_one_shot()
  with pytest.raises(UserError, match=r"config\.weight\.apply='straight_through'.*valid: masked"):
    MAGNITUDE(total_steps=1, apply='straight_through').check_one_shot()


def test_a_misspelt_trait_fails_where_the_class_is_made():
  with pytest.raises(TypeError, match='need'):
    Traits(need=('grads',))
