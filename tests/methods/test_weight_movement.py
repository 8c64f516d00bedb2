"""Movement pruning, by count and by threshold: scores, masks and gradients against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from one_run import states_of

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.runs.setup import setup

HARD, SOFT = (slots.method('weight', name) for name in ('movement', 'movement_soft'))
KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
W, OUTER = DRAW.normal(size=(2, 6, 5)).astype('f')
SCORES = DRAW.normal(-2.2, 1.0, size=(6, 5)).astype('f')
PARAMS, TARGET = {'w': jnp.asarray(W), 'b': jnp.ones(5)}, {'w': jnp.float32(0.4), 'b': None}
# Plain gradient descent, in which the identity of the paper holds, on a head that is not zero.
PLAIN = {
  'model__init': 'gpt2',
  'optimizer__name': 'sgd',
  'optimizer__momentum': 0.0,
  'optimizer__schedule': 'constant',
  'optimizer__warmup': 0.0,
  'optimizer__weight_decay': 0.0,
  'optimizer__clip': 0.0,
  'optimizer__learning_rate': 0.5,
  'weight__dense': ('embed', 'head', 'norm', 'attention'),
}
STEPS = 6


def largest(scores, count):
  mask = np.zeros(scores.size, bool)
  mask[np.argsort(-np.asarray(scores), axis=None, kind='stable')[:count]] = True
  return mask.reshape(scores.shape)


def sigmoid(x):
  return 1 / (1 + np.exp(-np.float64(x)))


def with_scores(method, target, scores=SCORES):
  """The state of a method whose scores are `scores`."""
  trainable, sparse = method.init(KEY, PARAMS, target)
  assert not any(leaf.any() for leaf in jax.tree.leaves(trainable['learned']))
  learned = jax.tree.map(lambda _: jnp.asarray(scores), trainable['learned'])
  return trainable | {'learned': learned}, sparse


def gradient(method, sparse, trainable, step):
  """What the model sees, its density, and the gradient where that of what it sees is OUTER."""

  def loss(trainable):
    seen, density = method.effective(trainable, sparse, 'train', jnp.int32(step), None)
    return jnp.sum(seen['w'] * OUTER), (seen['w'], density['w'])

  found, aside = jax.jit(jax.grad(loss, has_aux=True))(trainable)
  return (*jax.device_get(aside), jax.device_get(found))


@pytest.mark.parametrize(('step', 'count'), [(25, 30), (50, 14), (75, 12)])
def test_the_largest_scores_are_kept_along_the_ramp_and_dropped_weights_get_no_gradient(
  step, count
):
  method = HARD(total_steps=100)
  trainable, sparse = with_scores(method, TARGET)
  # Density .4 + .6 (1 - progress)^3: 1 at the start, .475 half way, .4 at the end.
  assert count == round(30 * (0.4 + 0.6 * (1 - (step - 25) / 50) ** 3))
  mask = largest(SCORES, count)
  seen, density, grads = gradient(method, sparse, trainable, step)
  assert_array_equal(seen, np.where(mask, W, 0))
  assert density == pytest.approx(count / 30)
  assert_array_equal(grads['params']['w'], np.where(mask, OUTER, 0))
  assert_allclose(grads['learned']['w'], OUTER * W, rtol=1e-6)
  params, masks = method.finalize(trainable, sparse, jnp.int32(step))
  assert_array_equal(masks['w'], mask)
  assert_array_equal(params['w'], np.where(mask, W, 0))
  assert_array_equal(method.constrain(trainable, sparse)['params']['w'], W)


def test_ties_of_the_first_scores_drop_nothing():
  method = HARD(total_steps=100, start=0.0)
  method.check()
  trainable, sparse = with_scores(method, TARGET, np.zeros((6, 5), 'f'))
  assert_array_equal(gradient(method, sparse, trainable, 0)[0], W)
  for fields in ({'schedule': 'at_once', 'start': 0.0}, {'start': 0.0, 'end': 0.0}):
    with pytest.raises(UserError, match=r'^config\.weight\.start=0\.0.*all scores are zero'):
      HARD(total_steps=100, **fields).check()


def test_scores_above_the_threshold_are_kept_and_the_price_is_the_mean_of_their_sigmoids():
  method = SOFT(total_steps=100, threshold=0.1, price=3.0)
  trainable, sparse = with_scores(method, TARGET)
  mask = sigmoid(SCORES) > 0.1
  assert 5 < mask.sum() < 25
  seen, density, grads = gradient(method, sparse, trainable, 3)
  assert_array_equal(seen, np.where(mask, W, 0))
  assert density == pytest.approx(mask.mean())
  assert_array_equal(grads['params']['w'], np.where(mask, OUTER, 0))
  assert_allclose(grads['learned']['w'], OUTER * W, rtol=1e-5)
  slope = sigmoid(SCORES) * (1 - sigmoid(SCORES)) / 30

  def price(trainable):
    _, density = method.effective(trainable, sparse, 'train', jnp.int32(3), None)
    return method.penalty(trainable, sparse, density)

  value, grads = jax.value_and_grad(price)(trainable)
  assert value == pytest.approx(3 * sigmoid(SCORES).mean(), rel=1e-5)
  assert_allclose(grads['learned']['w'], 3 * slope, rtol=1e-4)
  # The budget controller moves the fraction that runs by the same slope.
  moved = jax.grad(lambda t: method.effective(t, sparse, 'train', 3, None)[1]['w'])(trainable)
  assert_allclose(moved['learned']['w'], slope, rtol=1e-4)
  params, masks = method.finalize(trainable, sparse, jnp.int32(3))
  assert_array_equal(masks['w'], mask)
  assert_array_equal(params['w'], np.where(mask, W, 0))


def test_a_block_has_one_score_which_gets_the_sum_of_its_weights():
  method = SOFT(total_steps=10, pattern='row')
  trainable, sparse = method.init(KEY, PARAMS, TARGET)
  trainable = trainable | {
    'learned': jax.tree.map(lambda s: s - 3 * (np.arange(6)[:, None] > 2), trainable['learned'])
  }
  seen, _, grads = gradient(method, sparse, trainable, 0)
  assert_array_equal(seen, np.where(np.arange(6)[:, None] < 3, W, 0))
  assert_allclose(grads['learned']['w'][:, 0], (OUTER * W).sum(axis=1), rtol=1e-5)


@pytest.fixture(scope='module')
def trained(tiny_config):
  """`trained(name, **fields)`: the run and its states, every one on the host, and its batches."""

  def run(name, **fields):
    prepared = setup(tiny_config(**(PLAIN | fields), weight__name=name, train__steps=STEPS))
    batches = prepared.data.train_iterator(rng.data_seed(0))
    read = [next(batches) for _ in range(STEPS)]
    return prepared, states_of(prepared, prepared.program.init(0, prepared.target), read), read

  return run


def seen_gradients(run, states, batches):
  """By step, the gradients of the mean nats at what the model sees, by path."""

  def nats(params, tokens):
    logits = run.program.model.apply({'params': params}, tokens[:, :-1], mode='eval')
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(picked)

  found = []
  for state, tokens in zip(states, batches):
    seen, _ = run.program.method.effective(state.trainable, state.sparse, 'eval', state.step, None)
    found.append(tree.named(jax.device_get(jax.jit(jax.grad(nats))(seen, tokens))))
  return found


def test_scores_are_minus_the_rate_times_the_sum_of_gradients_times_weights(trained):
  run, states, batches = trained('movement', weight__sparsity=0.75, optimizer__ema=0.5)
  grads = seen_gradients(run, states, batches)
  scores = [tree.named(state.trainable['learned']) for state in states]
  assert len(scores[0]) == 2
  for path in scores[0]:
    weights = [np.float64(tree.named(state.trainable['params'])[path]) for state in states]
    moved = [-0.5 * g[path] * w for g, w in zip(grads, weights)]
    size = np.abs(sum(moved)).max()
    assert_allclose(scores[-1][path], sum(moved), rtol=1e-3, atol=1e-3 * size)
    mask = largest(scores[-2][path], weights[0].size // 4)  # from step 5 of 6 on
    frozen = weights[-1] == weights[-2]
    assert (~mask).sum() <= frozen.sum() and frozen[~mask].all()
    assert_array_equal(
      tree.named(run.program.finalize(states[-1])[1])[path],
      largest(tree.named(states[-1].ema['learned'])[path], mask.size // 4),
    )
    average = np.zeros_like(weights[0])
    for found in scores[1:]:
      average = 0.5 * average + 0.5 * np.float64(found[path])
    assert_allclose(tree.named(states[-1].ema['learned'])[path], average, rtol=1e-4, atol=1e-9)


def test_soft_scores_have_a_rate_of_their_own_and_no_decay(trained):
  free, dear = (
    trained(
      'movement_soft', weight__learned_rate=20.0, weight__price=price, optimizer__weight_decay=decay
    )
    for price, decay in ((0.0, 0.0), (4.0, 0.5))
  )
  grads = seen_gradients(*free)
  first = seen_gradients(*(dear[0], dear[1][:1], dear[2][:1]))[0]
  for path in tree.named(free[1][0].trainable['learned']):
    weights = [tree.named(state.trainable['params'])[path] for state in free[1]]
    want = sum(-0.5 * 20 * g[path] * w for g, w in zip(grads, weights))
    got = tree.named(free[1][-1].trainable['learned'])[path]
    assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    # Of 1024 weights, each pays the price times a quarter, the slope at zero.
    step = tree.named(dear[1][1].trainable['learned'])[path]
    want = -0.5 * 20 * (first[path] * weights[0] + 4 * 0.25 / 1024)
    assert_allclose(step, want, rtol=1e-3)


def test_a_price_makes_the_model_sparse_and_the_density_is_what_is_kept(trained):
  run, states, _ = trained('movement_soft', weight__learned_rate=1000.0, weight__price=4.0)
  _, masks = run.program.finalize(states[-1])
  dropped = [int((~np.asarray(mask)).sum()) for mask in jax.tree.leaves(masks)]
  _, density = run.program.method.effective(
    states[-1].trainable, states[-1].sparse, 'train', STEPS, None
  )
  assert sum(dropped) > 0
  for path, mask in tree.named(masks).items():
    assert float(tree.named(density)[path]) == pytest.approx(np.mean(mask))
