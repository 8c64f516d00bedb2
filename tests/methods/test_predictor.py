"""Units chosen by a predictor against a loop over tokens that computes the chosen ones only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from configs import base
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, plans, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost

VOCAB, BATCH, LENGTH, WIDTH, HIDDEN = 11, 2, 5, 10, 24
SEEDS = st.integers(0, 2**31)
SELECTORS = pytest.mark.parametrize('selector', ['statistical', 'exact'])
ACTIVATIONS = {
  'relu2': lambda h: np.maximum(h, 0) ** 2,
  'gelu': lambda h: h * norm.cdf(h),
}


def config_of(mlp='predictor_topk', bias=True, **fields):
  config = base.get_config()
  config.data.context = LENGTH
  config.model.update({'layers': 1, 'width': WIDTH, 'hidden': HIDDEN, 'bias': bias})
  config.model.update({'heads': 1, 'kv_heads': 1})
  config.mlp.update({'name': mlp, **fields})
  return config


@functools.cache
def module(activation='relu2', **fields):
  spec = Spec.from_config(config_of().model, VOCAB, LENGTH)
  make = functools.partial(slots.method('activation', activation), name='activation')
  return slots.method('mlp', 'predictor_topk')(spec=spec, activation=make, **fields)


@functools.cache
def applied(mlp, mode='eval'):
  """`(params, x) -> (y, what was sown)`."""
  return jax.jit(lambda p, x: mlp.apply({'params': p}, x, mode, mutable=['stats', 'gates']))


def numbers(seed, split=0.5):
  """Random parameters and inputs; the predictor reads the first `split` of these."""
  draw, r = np.random.default_rng(seed).normal, round(split * WIDTH)
  kernels = {'predictor': (r, HIDDEN), 'up': (WIDTH - r, HIDDEN), 'down': (HIDDEN, WIDTH)}
  params = {
    name: {
      'kernel': draw(0, 0.6, shape).astype(np.float32),
      'bias': draw(0, 0.3, shape[1]).astype(np.float32),
    }
    for name, shape in kernels.items()
  }
  return params, draw(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)


def select(score, density, selector):
  """What is activated of one token's scores, which units are chosen, and the margin of the choice."""
  if density == 1:
    return score, np.ones(HIDDEN, bool), np.inf
  if selector == 'statistical':
    above = score - score.mean() - score.std() * norm.ppf(1 - density)
    return np.maximum(above, 0), above > 0, np.abs(above).min()
  order, k = np.argsort(-score, kind='stable'), round(density * HIDDEN)
  return score, np.isin(range(HIDDEN), order[:k]), score[order[k - 1]] - score[order[k]]


def by_tokens(params, x, density, selector='statistical', activation='relu2'):
  """y, the units chosen, the hidden units, and the least margin of a choice; float64."""
  y, h, margins = np.zeros(x.shape), np.zeros((*x.shape[:2], HIDDEN)), []
  chosen = np.zeros(h.shape, bool)
  r = len(params['predictor']['kernel'])
  (predictor, b_0), (up, b_1), (down, b_2) = (
    (params[name]['kernel'], params[name]['bias']) for name in ('predictor', 'up', 'down')
  )
  for at in np.ndindex(x.shape[:2]):
    token = x[at].astype(np.float64)
    score, here, margin = select(token[:r] @ predictor + b_0, density, selector)
    units = np.flatnonzero(here)
    h[at][units] = ACTIVATIONS[activation](score[units]) * (token[r:] @ up[:, units] + b_1[units])
    y[at] = h[at][units] @ down[units] + b_2
    chosen[at] = here
    margins.append(margin)
  return y, chosen, h, min(margins)


@given(SEEDS, st.sampled_from([(0.25, 0.5), (0.5, 0.3)]))
@settings(deadline=None, max_examples=20)
@pytest.mark.parametrize('activation', ACTIVATIONS)
@SELECTORS
def test_output_equals_a_loop_that_computes_the_chosen_units_only(
  selector, activation, seed, sizes
):
  density, split = sizes
  params, x = numbers(seed, split)
  y, chosen, h, margin = by_tokens(params, x, density, selector, activation)
  assume(margin > 1e-4)
  got, sown = applied(module(activation, density=density, split=split, selector=selector))(
    params, x
  )
  assert_allclose(got, y, rtol=1e-4, atol=1e-4)
  # What is chosen has to be computed, whether it is zero in the end or not.
  assert np.mean(sown['gates']['active']) == pytest.approx(chosen.mean(), abs=1e-6)
  assert float(sown['stats']['active']) == pytest.approx((h != 0).mean(), abs=1e-6)
  assert selector != 'exact' or chosen.mean() == density


@pytest.mark.parametrize('activation', ACTIVATIONS)
@SELECTORS
def test_at_density_one_every_unit_is_computed(selector, activation):
  params, x = numbers(1)
  y, sown = applied(module(activation, density=1.0, selector=selector))(params, x)
  assert_allclose(y, by_tokens(params, x, 1, activation=activation)[0], rtol=1e-4, atol=1e-4)
  assert np.mean(sown['gates']['active']) == 1


@SELECTORS
def test_equal_scores_go_to_the_units_of_lower_index_where_the_choice_is_exact(selector):
  params, x = numbers(2)
  params['predictor']['kernel'][:] = 0
  params['predictor']['bias'][:] = np.arange(HIDDEN) % 3
  y, sown = applied(module(density=0.25, selector=selector))(params, x)
  want, chosen, *_ = by_tokens(params, x, 0.25, selector)
  assert_allclose(y, want, rtol=1e-4, atol=1e-4)
  assert np.mean(sown['gates']['active']) == pytest.approx(chosen.mean())
  # Eight units score highest: six of them fit, or all are above the threshold.
  first = np.arange(2, HIDDEN, 3)
  assert (
    np.flatnonzero(chosen[0, 0]).tolist() == (first[:6] if selector == 'exact' else first).tolist()
  )


@SELECTORS
def test_units_that_are_not_selected_need_neither_projection(selector):
  params, x = numbers(3)
  run = applied(module('gelu', density=0.25, selector=selector))
  y, _ = run(params, x)
  _, chosen, _, margin = by_tokens(params, x, 0.25, selector, 'gelu')
  assert margin > 1e-4
  for at in np.ndindex(x.shape[:2]):
    for fill in (0, 1e6):
      up = {name: np.where(chosen[at], a, fill) for name, a in params['up'].items()}
      kernel = np.where(chosen[at][:, None], params['down']['kernel'], fill)
      other = params | {'up': up, 'down': params['down'] | {'kernel': kernel}}
      moved = np.asarray(run(jax.tree.map(np.float32, other), x)[0])
      assert_array_equal(moved[at], y[at])
      assert np.abs(moved - y).max() > 0.01  # other tokens choose others


@SELECTORS
def test_gradients_equal_finite_differences(selector):
  params, x = numbers(4)
  rng = np.random.default_rng(5)
  toward = jax.tree.map(lambda a: rng.standard_normal(a.shape), params)
  aside, target = rng.standard_normal((2, *x.shape))
  assert by_tokens(params, x, 0.25, selector)[3] > 1e-4

  def by_hand(step):
    moved = jax.tree.map(lambda a, d: a + step * d, params, toward)
    return (by_tokens(moved, x + step * aside, 0.25, selector)[0] * target).sum()

  run = applied(module(density=0.25, selector=selector), 'train')
  grad = jax.jit(jax.grad(lambda p, x: jnp.sum(run(p, x)[0] * target), argnums=(0, 1)))
  to_params, to_x = grad(params, x)
  slopes = jax.tree.map(lambda g, d: (g * d).sum(), to_params, toward)
  slope = sum(jax.tree.leaves(slopes)) + (to_x * aside).sum()
  assert float(slope) == pytest.approx((by_hand(1e-6) - by_hand(-1e-6)) / 2e-6, rel=1e-4)
  assert all(np.abs(g['kernel']).any() for g in to_params.values())


@SELECTORS
def test_training_computes_the_same_and_observes_nothing(selector):
  params, x = numbers(6)
  mlp = module(density=0.25, selector=selector)
  y, sown = applied(mlp, 'train')(params, x)
  assert not sown
  assert_allclose(y, by_tokens(params, x, 0.25, selector)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('split', [0.1, 0.5, 0.73, 0.9])
def test_it_has_as_many_parameters_as_the_plain_mlp(split):
  def count(config):
    params = plan_of(lm.from_config(config, VOCAB)).params['block_0']['mlp']
    return sum(a.size for a in jax.tree.leaves(params))

  plain = 2 * WIDTH * HIDDEN
  assert count(config_of('dense', bias=False)) == count(config_of(bias=False, split=split)) == plain
  # A bias for the predictor's units comes on top.
  assert count(config_of(split=split)) == plain + 2 * HIDDEN + WIDTH


@pytest.mark.parametrize(('split', 'selector'), [(0.5, 'statistical'), (0.3, 'exact')])
def test_the_ledger_gates_up_and_down_but_not_the_predictor(split, selector):
  model = lm.from_config(config_of(density=0.25, split=split, selector=selector), VOCAB)
  notes = {p: m for p, m in plans.ledger(model, LENGTH).items() if p.startswith('block_0/mlp/')}
  gate, r = (cost.Gate(path='block_0/mlp', planned=0.25),), round(split * WIDTH)
  want = {
    'predictor': (2 * r * HIDDEN, ()),
    'up': (2 * (WIDTH - r) * HIDDEN, gate),
    'down': (2 * HIDDEN * WIDTH, gate),
  }
  found = {path.split('/')[2]: (matmul.flops, matmul.gates) for path, matmul in notes.items()}
  assert found == want
  rng = np.random.default_rng(7)
  shapes = plan_of(model).params
  params = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(np.float32), shapes)
  tokens = rng.integers(0, VOCAB, (BATCH, LENGTH))
  run = jax.jit(lambda p, t: model.apply({'params': p}, t, mutable=['gates'])[1])
  measured = tree.named(run(params, tokens)['gates'])
  assert measured.keys() == {'block_0/mlp/active'}
  active = float(np.mean(measured['block_0/mlp/active']))
  assert active == 0.25 if selector == 'exact' else 0.15 < active < 0.4
  left = cost.forward_flops(notes, {}, {'block_0/mlp': active})
  assert left == pytest.approx(2 * HIDDEN * (r + active * (2 * WIDTH - r)))


@pytest.mark.parametrize(
  ('field', 'value', 'valid'),
  [
    ('split', 0.0, 'valid: a fraction that leaves each side one of the 10 inputs'),
    ('split', 0.04, 'valid: a fraction that leaves each side one of the 10 inputs'),
    ('split', 0.97, 'valid: a fraction that leaves each side one of the 10 inputs'),
    ('split', 1.0, 'valid: a fraction that leaves each side one of the 10 inputs'),
    ('selector', 'exakt', "did you mean 'exact'? valid: exact, statistical"),
  ],
)
def test_bad_fields_are_refused_in_one_line(field, value, valid):
  with pytest.raises(UserError) as refused:
    lm.from_config(config_of(**{field: value}), VOCAB)
  message = str(refused.value)
  assert f'config.mlp.{field}' in message and repr(value) in message and valid in message
  assert '\n' not in message


def test_fields_at_the_ends_of_their_ranges_are_accepted():
  for fields in ({'density': 1.0}, {'density': 0.001}, {'split': 0.1}, {'split': 0.9}):
    assert plan_of(lm.from_config(config_of(**fields), VOCAB)).variables
