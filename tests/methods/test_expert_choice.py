"""Experts that choose their tokens against loops over experts in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from configs import base
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.layers.sow import SOWN
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, slots
from sparse_lm.plan import executed
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.setup import setup

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS = 4, 8, 8, 12, 4
TOKENS = BATCH * LENGTH
RELU2 = functools.partial(slots.method('activation', 'relu2'), name='activation')
SEEDS = st.integers(0, 2**31)


def module(**fields):
  config = base.get_config()
  config.model.update({'width': WIDTH, 'hidden': HIDDEN, 'bias': True})
  spec = Spec.from_config(config.model, vocab=11, context=LENGTH)
  cls = slots.method('mlp', 'expert_choice')
  return cls(spec=spec, activation=RELU2, **{'experts': EXPERTS, **fields})


SEATS = {0.5: 4, 1.05: 8, 1.1: 9, 2.0: 16}  # by visits: how many of 32 tokens an expert takes


@functools.cache
def applied(mlp, mode, moves=False):
  """`(variables, x) -> (y, what was sown)`; with `moves` the thresholds after it too."""
  mutable = [*SOWN, 'router'] if moves else list(SOWN)
  return jax.jit(lambda v, x: mlp.apply(v, x, mode, mutable=mutable))


@functools.cache
def shapes(mlp):
  x = jnp.zeros((BATCH, LENGTH, WIDTH))
  return jax.eval_shape(lambda: mlp.init(jax.random.key(0), x, 'eval'))


def numbers(mlp, seed):
  """Random variables and inputs; thresholds where some tokens pass."""
  draw = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda a: draw.normal(0, 0.5, a.shape).astype(np.float32), shapes(mlp)['params']
  )
  threshold = draw.uniform(0.1, 0.6, EXPERTS).astype(np.float32)
  x = draw.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
  return {'params': params, 'router': {'threshold': threshold}}, x


def probabilities(params, x):
  logits = x.reshape(-1, WIDTH).astype(np.float64) @ params['router']['kernel'].astype(np.float64)
  odds = np.exp(logits)
  return odds / odds.sum(-1, keepdims=True)


def expert(params, e, x):
  p = params['experts']
  h = np.maximum(x.astype(np.float64) @ p['up'][e] + p['up_bias'][e], 0) ** 2
  return h @ p['down'][e] + p['down_bias'][e]


def chosen(probability, seats):
  """bool `[T, E]`: of equal ones (to nine digits) an expert takes the one that comes first."""
  taken = np.zeros(probability.shape, bool)
  for e in range(EXPERTS):
    order = sorted(range(TOKENS), key=lambda t: (-round(probability[t, e], 9), t))
    taken[order[:seats], e] = True
  return taken


def weighted(params, x, taken):
  """Sum of the outputs of the experts that took a token, by their probabilities."""
  probability, flat = probabilities(params, x), x.reshape(-1, WIDTH)
  y = np.zeros(flat.shape)
  for t, e in zip(*np.nonzero(taken)):
    y[t] += probability[t, e] * expert(params, e, flat[t])
  return y.reshape(x.shape)


def decided(probability, seats):
  """Whether float32 rounding cannot change who is taken."""
  ordered = -np.sort(-probability, axis=0)
  return (ordered[seats - 1] - ordered[seats]).min() > 1e-5


def close(got, want, scale=1e-5):
  assert_allclose(got, want, rtol=1e-4, atol=scale * max(np.abs(want).max(), 1))


@given(SEEDS, st.sampled_from([0.5, 3.0]))
@settings(deadline=None, max_examples=10)
@pytest.mark.parametrize('executor', ['sort', 'einsum'])
@pytest.mark.parametrize('visits', SEATS)
def test_training_equals_a_loop_over_experts(visits, executor, seed, sharp):
  mlp, seats = module(visits=visits, executor=executor), SEATS[visits]
  variables, x = numbers(mlp, seed)
  params = variables['params']
  params['router']['kernel'] *= sharp
  probability = probabilities(params, x)
  assume(decided(probability, seats))
  y, sown = applied(mlp, 'train')(variables, x)
  close(y, weighted(params, x, chosen(probability, seats)))
  stats = sown['stats']
  assert_allclose(stats['load'], np.full(EXPERTS, 0.25), rtol=1e-6)
  assert abs(stats['max_violation']) < 1e-6
  assert float(stats['drop_rate']) == float(stats['dead_experts']) == 0
  entropy = -(probability * np.log(probability)).sum(-1).mean()
  assert float(stats['entropy']) == pytest.approx(entropy, rel=1e-4)
  # Whole seats: what runs may differ a little from what the config says.
  assert np.mean(sown['gates']['active']) == pytest.approx(EXPERTS * seats / TOKENS / visits)
  assert 'losses' not in sown


@given(SEEDS)
@settings(deadline=None, max_examples=15)
@pytest.mark.parametrize('executor', ['sort', 'einsum'])
def test_of_equal_tokens_an_expert_takes_the_earlier(executor, seed):
  mlp = module(executor=executor)
  variables, _ = numbers(mlp, seed)
  # Each token is one of five, so that every expert's last seat has several equal candidates.
  kinds = np.random.default_rng(seed).integers(0, 5, TOKENS)
  x = np.eye(WIDTH, dtype=np.float32)[kinds].reshape(BATCH, LENGTH, WIDTH)
  probability = probabilities(variables['params'], x)
  apart = np.diff(np.sort(probabilities(variables['params'], np.eye(WIDTH)[:5]), axis=0), axis=0)
  taken = chosen(probability, 8)
  assume(apart.min() > 1e-5 and not decided(probability, 8))
  close(applied(mlp, 'train')(variables, x)[0], weighted(variables['params'], x, taken))


def test_with_equal_scores_every_expert_takes_the_first_tokens():
  variables, x = numbers(module(), 0)
  variables['params']['router']['kernel'] *= 0
  y = np.asarray(applied(module(), 'train')(variables, x)[0]).reshape(TOKENS, WIDTH)
  mean = sum(expert(variables['params'], e, x.reshape(TOKENS, -1)) for e in range(4)) / 4
  close(y[:8], mean[:8])
  assert not y[8:].any() and np.abs(mean[8:]).max(-1).min() > 0.01


@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_thresholds_move_to_the_lowest_probability_taken(seed):
  mlp = module(decay=0.8, visits=0.5)
  variables, x = numbers(mlp, seed)
  before = variables['router']['threshold']
  lowest = np.sort(probabilities(variables['params'], x), axis=0)[-4]
  _, after = applied(mlp, 'train', moves=True)(variables, x)
  assert_allclose(after['router']['threshold'], 0.8 * before + 0.2 * lowest, rtol=1e-5)
  _, after = applied(mlp, 'eval', moves=True)(variables, x)
  assert_array_equal(after['router']['threshold'], before)


@given(SEEDS)
@settings(deadline=None, max_examples=15)
@pytest.mark.parametrize('executor', ['sort', 'einsum'])
def test_evaluation_takes_tokens_above_the_thresholds(executor, seed):
  mlp = module(executor=executor)
  variables, x = numbers(mlp, seed)
  probability, threshold = probabilities(variables['params'], x), variables['router']['threshold']
  assume(np.abs(probability - threshold).min() > 1e-5)
  taken = probability > threshold
  y, sown = applied(mlp, 'eval')(variables, x)
  close(y, weighted(variables['params'], x, taken))
  assert_allclose(sown['stats']['load'], taken.sum(0) / max(taken.sum(), 1), rtol=1e-6)
  assert float(sown['stats']['drop_rate']) == 0
  assert np.mean(sown['gates']['active']) == pytest.approx(taken.sum() / TOKENS)


def test_evaluation_takes_no_token_at_the_threshold_itself():
  variables, x = numbers(module(), 1)
  variables['params']['router']['kernel'] *= 0
  for threshold, any_taken in ((0.25, False), (np.nextafter(np.float32(0.25), 0), True)):
    variables['router']['threshold'] = np.full(EXPERTS, threshold, np.float32)
    y, sown = applied(module(), 'eval')(variables, x)
    assert bool(np.any(y)) == any_taken
    assert np.mean(sown['gates']['active']) == (EXPERTS if any_taken else 0)


def test_training_reads_later_tokens_and_evaluation_no_other_token():
  variables, x = numbers(module(), 2)
  favourites = variables['params']['router']['kernel'].T
  for cut in (1, 4, 7):
    other = x.copy()
    # Every expert gets tokens that it likes better than any.
    liked = 5 * favourites[np.arange(BATCH * (LENGTH - cut)) % EXPERTS]
    other[:, cut:] = liked.reshape(BATCH, -1, WIDTH)
    moved = {m: [applied(module(), m)(variables, v)[0] for v in (x, other)] for m in lm.MODES}
    before, after = moved['train']
    assert np.abs(before - after)[:, :cut].max() > 0.01
    before, after = moved['eval']
    assert_allclose(after[:, :cut], before[:, :cut], rtol=1e-5, atol=1e-6)
    assert np.abs(before - after)[:, cut:].max() > 0.01
  assert module().traits.non_causal == ('train',)


@pytest.mark.parametrize('mode', lm.MODES)
def test_identical_experts_that_take_every_token_equal_one_mlp(mode):
  mlp = module(visits=float(EXPERTS))
  variables, x = numbers(mlp, 3)
  params = variables['params']
  params['experts'] = jax.tree.map(lambda a: np.repeat(a[:1], EXPERTS, 0), params['experts'])
  variables['router']['threshold'] = np.zeros(EXPERTS, np.float32)  # lets every token through
  y, _ = applied(mlp, mode)(variables, x)
  close(y, expert(params, 0, x), scale=1e-6)


def test_gradients_of_both_executors_equal_finite_differences_of_the_loop():
  variables, x = numbers(module(), 5)
  params = jax.tree.map(lambda a: a.astype(np.float64), variables['params'])
  assert decided(probabilities(params, x), 8)  # the choice has no gradient and must not change
  draw = np.random.default_rng(6)
  toward = jax.tree.map(lambda a: draw.standard_normal(a.shape), params)
  aside, target = draw.standard_normal((2, *x.shape))

  def by_hand(step):
    moved, there = jax.tree.map(lambda a, d: a + step * d, params, toward), x + step * aside
    return (weighted(moved, there, chosen(probabilities(moved, there), 8)) * target).sum()

  want = (by_hand(1e-6) - by_hand(-1e-6)) / 2e-6
  for executor in ('sort', 'einsum'):
    run = applied(module(executor=executor), 'train')

    def loss(params, x, run=run):
      return jnp.sum(run({**variables, 'params': params}, x)[0] * target)

    to_params, to_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables['params'], x)
    slopes = jax.tree.map(lambda g, d: (g * d).sum(), to_params, toward)
    assert np.abs(to_params['router']['kernel']).min() > 1e-4
    assert float(sum(jax.tree.leaves(slopes)) + (to_x * aside).sum()) == pytest.approx(want, 1e-4)


@pytest.mark.parametrize('visits', [0.5, 1.0])
def test_thresholds_converge_to_the_configured_visits(visits):
  mlp = module(visits=visits)
  variables, _ = numbers(mlp, 8)
  variables['router']['threshold'] = np.full(EXPERTS, 0.25, np.float32)  # as a run starts
  draw = np.random.default_rng(9)
  held_out = draw.standard_normal((1, 20_000, WIDTH)).astype(np.float32)

  def measured():
    return visits * np.mean(applied(mlp, 'eval')(variables, held_out)[1]['gates']['active'])

  assert measured() > 1.2 * visits
  for _ in range(100):
    x = draw.standard_normal((1, 1024, WIDTH)).astype(np.float32)
    variables['router'] = applied(mlp, 'train', moves=True)(variables, x)[1]['router']
  assert measured() == pytest.approx(visits, rel=0.03)


@pytest.fixture(scope='module')
def two_steps(tiny_config):
  """The run, its batches and its state on the host before, between and after two steps."""
  fields = {'mlp.experts': 4, 'mlp.decay': 0.9, 'model.init': 'gpt2'}
  run = setup(tiny_config(mlp__name='expert_choice', **fields))
  batches = run.data.train_iterator(0)
  tokens, state = [next(batches) for _ in range(2)], run.program.init(0, run.target)
  states = [jax.device_get(state)]
  for batch in tokens:
    state, _ = run.program.train_step(state, batch)
    states.append(jax.device_get(state))
  return run, tokens, states


def test_thresholds_are_state_that_moves_with_every_step_and_no_parameter(two_steps):
  run, tokens, states = two_steps
  assert not any('threshold' in path for path in tree.named(states[0].trainable))
  assert not any('threshold' in path for path in tree.named(states[0].opt_state))
  for before, after, batch in zip(states, states[1:], tokens):
    assert list(before.model_state) == ['router']
    _, seen = run.program.model.apply(
      {'params': before.trainable['params'], **before.model_state},
      batch[:, :-1],
      'train',
      mutable=['intermediates', *before.model_state],
      capture_intermediates=True,
    )
    router = seen['intermediates']['block_0']['mlp']['router']
    logits = np.asarray(router['__call__'][0], np.float64)
    odds = np.exp(logits)
    lowest = np.sort(odds / odds.sum(-1, keepdims=True), axis=0)[-logits.shape[0] // 4]
    old, new = (s.model_state['router']['block_0']['mlp']['threshold'] for s in (before, after))
    assert_allclose(new, 0.9 * old + 0.1 * lowest, rtol=1e-5)
    assert np.abs(new - old).min() > 1e-6
  assert_array_equal(states[0].model_state['router']['block_0']['mlp']['threshold'], [0.25] * 4)


def test_evaluation_reads_the_thresholds_and_leaves_them(two_steps):
  run, _, states = two_steps
  state = states[-1]
  params, _ = run.program.finalize(state)
  kept = jax.tree.map(np.array, state.model_state)
  seen = evaluate(run, params, state.model_state)
  jax.tree.map(assert_array_equal, state.model_state, kept)
  none = jax.tree.map(np.ones_like, state.model_state)
  assert seen['val/gates/block_0/mlp'] > 0.1
  assert evaluate(run, params, none)['val/gates/block_0/mlp'] == 0


def test_the_ledger_counts_the_configured_visits(two_steps):
  variables, x = numbers(module(visits=2.0), 10)
  notes = executed.trace(lambda x: module(visits=2.0).apply(variables, x, 'eval'), x).ledger
  each, router = 2 * 2 * TOKENS * WIDTH * HIDDEN, 2 * TOKENS * WIDTH * EXPERTS
  names = 'router/linear', 'experts/up/linear', 'experts/down/linear'
  found = {path: m.flops for path, m in notes.items() if m.kind != 'bias'}
  assert found == dict(zip(names, (router, each, each)))
  assert lm.causal(two_steps[0].program.model) == {'train': False, 'eval': True}


@pytest.mark.parametrize(
  ('fields', 'value', 'valid'),
  [
    ({'visits': 0.49}, 'visits=0.49', '0.5 (below'),  # 4 experts, 8 tokens a sequence
    ({'visits': 4.1}, 'visits=4.1', '0.5 (below'),
    ({'executor': 'einsums'}, "executor 'einsums'", 'einsum, sort'),
  ],
)
def test_bad_fields_are_refused_in_one_line(fields, value, valid):
  with pytest.raises(UserError) as refused:
    module(**fields).check()
  message = str(refused.value)
  assert f'config.mlp.{value}' in message and f'valid: {valid}' in message
  assert '\n' not in message


def test_fields_at_the_ends_of_their_ranges_are_accepted():
  for fields in ({'visits': 0.5}, {'visits': 4.0}, {'experts': 1}, {}):
    module(**fields).check()
