"""One optimizer step, against the same computation written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import tree
from sparse_lm.evals.loss import eval_step
from sparse_lm.model import plans
from sparse_lm.plan import executed
from sparse_lm.runs.build import build
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.setup import setup

# Plain gradient descent: the update is the gradient itself, and rounding is not amplified.
PLAIN = {
  'model__init': 'gpt2',  # no zero head, so that every gradient counts from the first step
  'optimizer__name': 'sgd',
  'optimizer__schedule': 'constant',
  'optimizer__warmup': 0.0,
  'optimizer__weight_decay': 0.0,
  'optimizer__clip': 0.0,
  'optimizer__learning_rate': 0.1,
  'weight__dense': ('embed', 'norm', 'head', 'attention'),
}
STE = {
  'weight__name': 'magnitude',
  'weight__apply': 'straight_through',
  'weight__start': 0.0,
  'weight__end': 0.0,
}
RIGL = PLAIN | {'weight__name': 'rigl', 'weight__sparsity': 0.75, 'weight__period': 3}


def start(config):
  run = setup(config)
  batches = run.data.train_iterator(0)
  return run, run.program.init(0, run.target), [next(batches) for _ in range(8)]


@pytest.fixture(scope='module')
def rigl(tiny_config):
  """The run, and its state on the host before each of five steps."""
  run, state, batches = start(tiny_config(**RIGL))
  states, metrics = [jax.device_get(state)], []
  for step in range(5):
    state, seen = run.program.step(step)(state, batches[step])
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(seen))
  return run, states, metrics, batches


def loss(model, params, tokens):
  """Mean cross-entropy, without the package's."""
  logits = model.apply({'params': params}, tokens[:, :-1], mode='eval')
  shifted = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
  return -jnp.mean(jnp.take_along_axis(shifted, tokens[:, 1:, None], axis=-1))


def dense_gradient(run, state, tokens):
  """At the masked parameters, for dropped weights too."""
  gradient = jax.jit(jax.grad(lambda params: loss(run.program.model, params, tokens)))
  return jax.device_get(gradient(state.trainable['params']))


def test_loss_is_the_cross_entropy(rigl):
  run, states, metrics, batches = rigl
  step = 4
  params = states[step].trainable['params']
  logits = np.asarray(
    jax.jit(run.program.model.apply)({'params': params}, batches[step][:, :-1]), np.float64
  )
  exponentials = np.exp(logits)
  chances = exponentials / exponentials.sum(axis=-1, keepdims=True)
  rows, columns = np.indices((4, 16))
  nats = -np.log(chances[rows, columns, batches[step][:, 1:]])
  assert_allclose(metrics[step]['loss'], nats.mean(), rtol=1e-5)
  weight = np.random.default_rng(0).random((4, 16)).astype('f')
  summed, _ = eval_step(run.program.model)({'params': params}, batches[step], weight)
  assert_allclose(summed, (nats * weight).sum(), rtol=1e-5)


def test_optimizer_gets_the_masked_gradient(rigl):
  run, states, metrics, batches = rigl
  before, after = states[0], states[1]
  masks = before.sparse.masks
  grads = dense_gradient(run, before, batches[0])
  masked = jax.tree.map(lambda g, m: g if m is None else np.where(m, g, 0), grads, masks)
  dense_part = tree.named(grads)['block_0/mlp/up/kernel'][~masks['block_0']['mlp']['up']['kernel']]
  assert np.abs(dense_part).max() > 1e-4, 'nothing to mask would prove nothing'
  (trace,) = traces(after)
  jax.tree.map(lambda t, g: assert_allclose(t, g, rtol=1e-3, atol=1e-6), trace, masked)
  for path, mask in tree.named(masks).items():
    assert not tree.named(trace)[path][~mask].any()
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(masked)))
  assert_allclose(metrics[0]['gradient_norm'], norm, rtol=1e-4)
  moved = jax.tree.map(lambda a, b: b - a, before.trainable['params'], after.trainable['params'])
  jax.tree.map(lambda d, g: assert_allclose(d, -0.1 * g, rtol=1e-2, atol=1e-6), moved, masked)


def traces(state):
  """Momentum: the trees in the optimizer's state that mirror the parameters."""
  like = jax.tree.structure(state.trainable)

  def same(node):
    return jax.tree.structure(node) == like

  return [t['params'] for t in jax.tree.leaves(state.opt_state, is_leaf=same) if same(t)]


def test_rigl_grows_on_the_dense_gradient_and_rests(rigl):
  run, states, _, batches = rigl
  step = 3
  assert run.program.method.due(step)
  before, after = states[step], states[step + 1]
  grads = tree.named(dense_gradient(run, before, batches[step]))
  weights, kept_weights = (
    tree.named(before.trainable['params']),
    tree.named(after.trainable['params']),
  )
  old, new = tree.named(before.sparse.masks), tree.named(after.sparse.masks)
  fraction = 0.3 / 2 * (1 + np.cos(np.pi * step / 9))  # updates end at 0.75 of 12 steps
  assert len(new) == 2
  for path, mask in old.items():
    drops = int(np.floor(fraction * mask.sum()))
    ranked = np.argsort(np.where(mask, -np.abs(weights[path]), np.inf), axis=None)
    keep = np.zeros(mask.size, bool)
    keep[ranked[: mask.sum() - drops]] = True
    grown = np.argsort(np.where(keep, np.inf, -np.abs(grads[path]).ravel()))[:drops]
    keep[grown] = True
    assert drops > 5 and (keep.reshape(mask.shape) != mask).any()
    assert_array_equal(new[path], keep.reshape(mask.shape))
    born = new[path] & ~mask
    assert not kept_weights[path][born].any()
  # The optimizer rests: what was kept, and all that is dense, stays bit for bit as it was.
  for path, value in weights.items():
    stayed = old[path] & new[path] if path in old else np.ones(value.shape, bool)
    assert_array_equal(kept_weights[path][stayed], value[stayed])
  for held, now in zip(traces(before), traces(after)):
    held, now = tree.named(held), tree.named(now)
    for path, moment in held.items():
      flips = old[path] != new[path] if path in old else np.zeros(moment.shape, bool)
      assert_array_equal(now[path], np.where(flips, 0, moment))
  assert int(after.step) == step + 1


def test_accumulation_equals_one_batch(rigl, tiny_config):
  _, states, metrics, batches = rigl
  split, state, same = start(tiny_config(**RIGL, train__accumulation=4))
  assert_array_equal(same, batches)
  for step in range(5):
    state, seen = split.program.step(step)(state, batches[step])
    assert_allclose(seen['loss'], metrics[step]['loss'], rtol=1e-5)
  want = states[5]
  jax.tree.map(assert_array_equal, state.sparse.masks, want.sparse.masks)
  jax.tree.map(
    lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.trainable, want.trainable
  )


@pytest.fixture(scope='module')
def straight_through(tiny_config):
  return start(tiny_config(**PLAIN, **STE, weight__sparsity=0.75))


def test_straight_through_trains_dropped_weights(straight_through):
  run, state, batches = straight_through
  # A copy, because the step donates its state. Step 1: no ramp is under way any more.
  state = jax.tree.map(jnp.copy, state).replace(step=jnp.int32(1))
  before = jax.device_get(state.trainable['params'])
  masks = jax.device_get(run.program.finalize(state)[1])
  seen = jax.tree.map(lambda w, m: w if m is None else np.where(m, w, 0), before, masks)
  masked = state.replace(trainable={'params': seen, 'learned': {}})
  grads = tree.named(dense_gradient(run, masked, batches[0]))  # at what the model sees
  state, metrics = run.program.step(1)(state, batches[0])
  before, after = tree.named(before), tree.named(jax.device_get(state.trainable['params']))
  for path, mask in tree.named(masks).items():
    moved = after[path] - before[path]
    assert np.abs(moved[~mask]).max() > 1e-5
    assert_allclose(moved, -0.1 * grads[path], rtol=1e-2, atol=1e-6)
  assert_allclose(metrics['density'], 0.25)


def test_straight_through_is_sparse_from_the_first_step_by_default(straight_through):
  # `start` and `end` both 0: "asks for the final sparsity from the first step".
  run, state, batches = straight_through
  assert run.program.method.density(0.25, 0) == 0.25
  _, metrics = run.program.step(0)(jax.tree.map(jnp.copy, state), batches[0])
  assert_allclose(metrics['density'], 0.25)


def test_evaluation_is_the_mean_over_every_prediction(rigl):
  run, states, _, _ = rigl
  params = jax.device_put(states[5].trainable['params'])
  text = np.asarray(run.data.tokens['validation'], np.int32)
  apply = jax.jit(lambda t: run.program.model.apply({'params': params}, t))
  nats, count = 0.0, 0
  for begin in range(0, len(text) - 1, 16):  # one window at a time, the last one shorter
    window = text[begin : begin + 17]
    logits = np.asarray(apply(window[None, :-1])[0], np.float64)
    nats += (np.log(np.exp(logits).sum(axis=-1)) - logits[range(len(window) - 1), window[1:]]).sum()
    count += len(window) - 1
  assert count == len(text) - 1 and count % (16 * 4), 'the last batch is to be padded'
  assert_allclose(evaluate(run, params, {})['val_loss'], nats / count, rtol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'passes'),
  [
    ({}, 3.0),
    ({'train.accumulation': 2}, 3.0),
    ({'depth.name': 'token_gate'}, 3.0),
    # The greedy baseline is a forward pass of its own.
    ({'depth.name': 'token_gate', 'depth.estimator': 'reinforce'}, 4.0),
  ],
)
def test_a_step_executes_the_forward_passes_that_are_charged(fields, passes, tiny_config):
  program, target = build(tiny_config(**fields), 11)
  state = jax.eval_shape(lambda: program.init(0, target))
  tokens = jax.ShapeDtypeStruct((4, 17), jnp.int32)
  step = program.transition
  forward = plans.traced(program.model, 16, 'train').flops
  assert executed.trace(step, state, tokens).per_token(4 * 16).flops == passes * forward
