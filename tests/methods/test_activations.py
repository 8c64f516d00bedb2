"""Activations that leave units at zero, and what is observed and claimed of them, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from configs import base
from sparse_lm.core import tree
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, plans, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost

VOCAB, LENGTH, WIDTH, HIDDEN = 11, 8, 8, 40
SEEDS = st.integers(0, 2**31)
ORACLES = {
  'relu': lambda h: np.maximum(h, 0),
  'relu2': lambda h: np.maximum(h, 0) ** 2,
  'gelu': lambda h: h * norm.cdf(h),
}
SLOPES = {
  'relu': lambda h: (h > 0) * 1.0,
  'relu2': lambda h: 2 * np.maximum(h, 0),
  'gelu': lambda h: norm.cdf(h) + h * norm.pdf(h),
}


@functools.cache
def maker(name, inner='relu2', **fields):
  """Makes the activation, as the model does where it calls it."""
  if fields:
    fields['inner'] = functools.partial(slots.method('activation', inner), name='inner')
  return functools.partial(slots.method('activation', name), name='activation', **fields)


def activation(*how, **fields):
  return maker(*how, **fields)()


@functools.cache
def applied(module, mode='eval'):
  return jax.jit(lambda h: module.apply({}, h, mode))


@functools.cache
def slope_of(module):
  return jax.jit(jax.grad(lambda h, target: jnp.sum(module.apply({}, h, 'train') * target)))


def rows(seed, units, ties=False):
  rng = np.random.default_rng(seed)
  h = rng.integers(-3, 4, (2, 5, units)) / 2 if ties else rng.standard_normal((2, 5, units))
  return h.astype(np.float32)


def largest(h, k):
  """The `k` largest of each row, ties to the lower index."""
  mask = np.zeros(h.shape, bool)
  for at in np.ndindex(h.shape[:-1]):
    mask[at][sorted(range(h.shape[-1]), key=lambda j: (-h[at][j], j))[:k]] = True
  return mask


def soft_threshold(h, density):
  h = np.asarray(h, np.float64)
  threshold = h.mean(-1, keepdims=True) + h.std(-1, keepdims=True) * norm.ppf(1 - density)
  return np.maximum(h - threshold, 0)


@pytest.mark.parametrize('name', ['relu', 'relu2'])
def test_rectifiers_and_their_slopes_equal_numpy(name):
  h = rows(0, 64, ties=True)
  assert (h == 0).any() and (h < 0).any()
  module, target = activation(name), rows(1, 64)
  assert_array_equal(applied(module)(h), ORACLES[name](h))
  assert_array_equal(slope_of(module)(h, target), target * SLOPES[name](h))


# The number of units decides how they are counted: 32 divides 64.
@given(SEEDS, st.sampled_from([(7, 0.25, 2), (40, 0.01, 1), (64, 0.25, 16)]), st.booleans())
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize('inner', ['relu2', 'gelu'])
def test_topk_applies_the_inner_activation_to_the_largest_of_each_row(inner, seed, sizes, ties):
  units, density, k = sizes
  h, target = rows(seed, units, ties), rows(seed + 1, units)
  mask, module = largest(h, k), activation('topk', inner, density=density)
  assert_allclose(applied(module)(h), mask * ORACLES[inner](h), rtol=1e-5, atol=1e-6)
  slope = np.asarray(slope_of(module)(h, target))
  assert_allclose(slope, mask * target * SLOPES[inner](h), rtol=1e-4, atol=1e-5)
  assert not slope[~mask].any()


@pytest.mark.parametrize('inner', ['relu', 'relu2', 'gelu', 'silu'])
@pytest.mark.parametrize('name', ['topk', 'statistical_topk'])
def test_at_density_one_only_the_inner_activation_is_left(name, inner):
  h = rows(2, 40)
  plain = applied(activation(inner))(h)
  assert_array_equal(applied(activation(name, inner, density=1.0))(h), plain)
  assert np.abs(applied(activation(name, inner, density=0.05))(h) - plain).max() > 0.1


@given(SEEDS, st.sampled_from([(7, 0.125, 'relu2'), (64, 0.6, 'gelu')]), st.floats(-2, 2))
@settings(deadline=None, max_examples=30)
def test_statistical_topk_equals_a_soft_threshold_of_population_statistics(seed, how, mean):
  units, density, inner = how
  h = (3 * rows(seed, units) + mean).astype(np.float32)
  want = ORACLES[inner](soft_threshold(h, density))
  y = applied(activation('statistical_topk', inner, density=density))(h)
  assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@given(SEEDS, st.sampled_from([0.125, 0.6]))
@settings(deadline=None, max_examples=15)
def test_statistical_topk_has_the_gradient_of_finite_differences(seed, density):
  h, target = rows(seed, 7).astype(np.float64), rows(seed + 1, 7)
  above = soft_threshold(h, density) > 0
  want, frozen = np.zeros(h.shape), target * SLOPES['relu2'](soft_threshold(h, density))
  for at in np.ndindex(h.shape):
    step = np.zeros(h.shape)
    step[at] = 1e-5
    ends = [ORACLES['relu2'](soft_threshold(h + d, density)) for d in (step, -step)]
    want[at] = ((ends[0] - ends[1]) * target).sum() / 2e-5
  got = slope_of(activation('statistical_topk', density=density))(h.astype(np.float32), target)
  assert_allclose(got, want, rtol=1e-3, atol=1e-3)
  # Units below the threshold move it: through the mean and the deviation they have a gradient.
  assert np.abs(np.asarray(got)[~above]).max() > 1e-3 and np.abs(got - frozen).max() > 1e-2


def test_the_measured_density_is_the_target_on_gaussian_rows_and_below_it_on_heavy_tails():
  rng = np.random.default_rng(3)
  gaussian, heavy = rng.standard_normal((256, 1024)), rng.standard_t(3, (256, 1024))
  for target in (0.08, 0.125, 0.5):
    run = applied(activation('statistical_topk', density=target))
    assert float((run(gaussian) != 0).mean()) == pytest.approx(target, abs=0.003)
    assert float((run(2 - 5 * gaussian) != 0).mean()) == pytest.approx(target, abs=0.003)
  exact = applied(activation('topk', 'relu', density=0.08))
  for h in (gaussian, heavy):
    assert set(np.asarray((exact(h) != 0).sum(-1))) == {round(0.08 * 1024)}
  run = applied(activation('statistical_topk', density=0.08))
  assert float((run(heavy) != 0).mean()) == pytest.approx(0.049, abs=0.004)


def config_of(**changes):
  config = base.get_config()
  config.data.context = LENGTH
  config.model.update({'layers': 1, 'width': WIDTH, 'hidden': HIDDEN, 'bias': True})
  config.model.update({'heads': 2, 'kv_heads': 2})
  for name, fields in changes.items():
    config[name].update(fields)
  return config


@functools.cache
def dense(make):
  """`(variables, x, mode) -> (y, what was sown)` of the plain MLP."""
  spec = Spec.from_config(config_of().model, VOCAB, LENGTH)
  mlp = slots.method('mlp', 'dense')(spec=spec, activation=make)
  run = lambda v, x, mode: mlp.apply(v, x, mode, mutable=['stats', 'gates'])  # noqa: E731
  return jax.jit(run, static_argnums=2)


def weights(seed, bias=-3.0, dead=(0, 5, 9)):
  """Units fire rarely, so that unions are no trivial ones, and some never do."""
  rng = np.random.default_rng(seed)
  biases = rng.normal(bias, 1, HIDDEN)
  biases[list(dead)] = -100
  up = {'kernel': rng.normal(0, 0.6, (WIDTH, HIDDEN)), 'bias': biases}
  down = {'kernel': rng.normal(size=(HIDDEN, WIDTH)), 'bias': rng.normal(size=WIDTH)}
  return {'params': jax.tree.map(np.float32, {'up': up, 'down': down})}


def inputs(seed, length=LENGTH, batch=2):
  return np.random.default_rng(seed).standard_normal((batch, length, WIDTH)).astype(np.float32)


def preactivations(variables, x):
  up = variables['params']['up']
  return x.astype(np.float64) @ up['kernel'] + up['bias']


@pytest.mark.parametrize('length', [1, 5, 8, 13, 32, 71])
def test_observations_equal_loops_over_tokens(length):
  variables, x = weights(4), inputs(5, length)
  fires = preactivations(variables, x) > 0
  want = {'active': fires.sum() / fires.size}
  want['dead'] = np.mean([not fires[..., unit].any() for unit in range(HIDDEN)])
  for chunk in (8, 32):
    size = min(chunk, length)  # a shorter sequence is one chunk; what a chunk lacks is left out
    parts = [row[i : i + size].any(0) for row in fires for i in range(0, length - size + 1, size)]
    want[f'union_{chunk}'] = np.mean(parts)
  _, sown = dense(maker('relu2'))(variables, x, 'eval')
  assert sown['stats'].keys() == want.keys()
  for name in want:
    assert float(sown['stats'][name]) == pytest.approx(want[name], abs=1e-6), name
  assert 0 < want['active'] < want['union_32'] + (length == 1) and want['dead'] > 0


def test_training_observes_nothing():
  variables, x = weights(4), inputs(5)
  run = dense(maker('topk', density=0.25))
  y, sown = run(variables, x, 'train')
  assert not sown
  assert_array_equal(run(variables, x, 'eval')[0], y)


SPARSE = {
  'relu': maker('relu'),
  'relu2': maker('relu2'),
  'topk': maker('topk', 'relu', density=0.1),
  'statistical_topk': maker('statistical_topk', 'gelu', density=0.1),
}


@pytest.mark.parametrize('name', SPARSE)
def test_rows_of_the_down_projection_with_zero_inputs_can_be_skipped(name):
  variables, x = weights(6, bias=-1.0, dead=()), inputs(7)
  h = preactivations(variables, x)
  h = {
    'relu': ORACLES['relu'](h),
    'relu2': ORACLES['relu2'](h),
    'topk': largest(h, 4) * ORACLES['relu'](h),
    'statistical_topk': ORACLES['gelu'](soft_threshold(h, 0.1)),
  }[name]
  run, down = dense(SPARSE[name]), variables['params']['down']
  y, sown = run(variables, x, 'eval')
  assert float(sown['stats']['active']) == pytest.approx((h != 0).mean(), abs=1e-6)
  for at in np.ndindex(x.shape[:2]):
    active = np.flatnonzero(h[at])
    assert 0 < len(active) < HIDDEN
    want = h[at][active] @ down['kernel'][active] + down['bias']
    assert_allclose(y[at], want, rtol=1e-4, atol=1e-4)
    spoilt = down['kernel'].copy()
    spoilt[np.delete(np.arange(HIDDEN), active)] = 1e6
    other = {**variables['params'], 'down': {**down, 'kernel': spoilt}}
    assert_array_equal(run({'params': other}, x, 'eval')[0][at], y[at])


GATE = 'block_0/mlp/activation'
CLAIMS = {'topk': {'density': 0.25}, 'statistical_topk': {'density': 0.25}}


def ledger_of(model):
  notes = plans.ledger(model, LENGTH)
  return {path: matmul for path, matmul in notes.items() if path.startswith('block_0/mlp/')}


@pytest.mark.parametrize('name', CLAIMS)
@pytest.mark.parametrize(('mlp', 'selected'), [('dense', ('down',)), ('gated', ('up', 'down'))])
def test_projections_of_selected_units_cost_what_is_active_and_the_other_one_all(
  name, mlp, selected
):
  model = lm.from_config(
    config_of(activation={'name': name, **CLAIMS[name]}, mlp={'name': mlp}), VOCAB
  )
  notes, few = ledger_of(model), len(selected)
  gates = {path: matmul.gates for path, matmul in notes.items()}
  for projection in selected:
    own = gates.pop(f'block_0/mlp/{projection}/linear')
    assert own == (cost.Gate(path=GATE, planned=0.25),)
  assert len(gates) == 1 and not any(gates.values())
  matrix = 2 * WIDTH * HIDDEN
  for fraction in (0.25, 0.05):
    flops = cost.forward_flops(notes, {}, {GATE: fraction} if fraction < 0.25 else {})
    assert flops == pytest.approx(matrix * (1 + few * fraction))
  assert cost.forward_flops(ledger_of(lm.dense_twin(model)), {}) == pytest.approx(
    matrix * (1 + few)
  )
  # What is measured replaces what is planned, and is found under the gate's path.
  rng = np.random.default_rng(8)
  shapes = plan_of(model).params
  params = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(np.float32), shapes)
  tokens = rng.integers(0, VOCAB, (2, LENGTH))
  run = jax.jit(lambda p, t: model.apply({'params': p}, t, mutable=['gates', 'stats'])[1])
  sown = run(params, tokens)
  (fraction,) = (value for path, value in tree.named(sown['gates']).items())
  assert fraction.shape == tokens.shape
  active = cost.open_fractions(notes, {GATE: fraction})[GATE]
  assert active == 0.25 if name == 'topk' else 0.01 < active < 0.4
  # A selected unit may be zero all the same: that is observed, and nothing follows from it.
  assert sown['stats']['block_0']['mlp']['active'] <= active


def test_a_selection_costs_what_it_bounds_not_the_zeros_of_the_activation():
  variables, x = weights(11, bias=-1.0), inputs(12)
  keeps = round(0.98 * HIDDEN)
  _, sown = dense(maker('topk', density=0.98))(variables, x, 'eval')
  assert float(sown['stats']['active']) < 0.5  # most of the selected units are zero
  assert_allclose(sown['gates']['activation']['active'], keeps / HIDDEN, rtol=1e-6)
  h, at = preactivations(variables, x), maker('statistical_topk', density=0.3)
  _, sown = dense(at)(variables, x, 'eval')
  chosen = soft_threshold(h, 0.3) > 0
  assert_allclose(sown['gates']['activation']['active'], chosen.mean(axis=-1), atol=1e-6)


@pytest.mark.parametrize('name', ['relu', 'relu2'])
def test_zeros_of_rectifiers_are_logged_and_not_charged_less(name):
  _, sown = dense(maker(name))(weights(9), inputs(10), 'eval')
  assert 0 < float(sown['stats']['active']) < 0.5 and 'gates' not in sown
  model = lm.from_config(config_of(activation={'name': name}), VOCAB)
  notes = ledger_of(model)
  assert len(notes) == 2 and not any(matmul.gates for matmul in notes.values())
  assert lm.dense_twin(model) == model
