"""Sparse attention against a loop over queries with an explicit mask in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from configs import base
from sparse_lm.core.errors import UserError
from sparse_lm.kernels.attention import KeyValues
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens
from sparse_lm.model import lm, plans, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 13, 8, 16, 4, 2
BATCH, QUERIES, KEYS, HEAD = 2, 5, 7, 4
SEEDS = st.integers(0, 2**31)
# Key heads, and keys that a query may read: few pairs, for each is compiled.
SIZES = st.sampled_from([(1, 4), (2, 1), (4, 3)])
PATH = 'block_0/attention/attention'


def config_of(**attention):
  config = base.get_config()
  config.data.context = CONTEXT
  config.model.update({'layers': LAYERS, 'width': WIDTH, 'hidden': 24})
  config.model.update({'heads': HEADS, 'kv_heads': 2})
  config.attention.update(attention)
  return config


@functools.cache
def method(name, **fields):
  spec = Spec.from_config(config_of().model, VOCAB, CONTEXT)
  return slots.method('attention', name)(spec=spec, **fields)


@functools.cache
def applied(module, mode='eval'):
  """`(variables, *arrays) -> (y, what was sown)`."""

  def run(variables, x, q, k, v, positions, key_positions, valid):
    tokens = Tokens(x, positions, jnp.ones(positions.shape, bool))
    keys = KeyValues(k, v, key_positions, valid)
    return module.apply(variables, tokens, q, keys, mode, mutable=['gates'])

  return jax.jit(run)


def arrays_of(seed, groups, reach=4, whole=False):
  """x, q, k, v, positions, positions of the keys, valid; `whole` numbers make ties that are exact.

  Keys have any positions in any order, as when a layer skips tokens, but in order where scores tie.
  Every query has a key less than `reach` before it.
  """
  rng = np.random.default_rng(seed)
  draw = (lambda *shape: rng.integers(-1, 2, shape)) if whole else (lambda *s: rng.normal(size=s))
  x, q = draw(BATCH, QUERIES, WIDTH), draw(BATCH, QUERIES, HEADS, HEAD)
  k, v = draw(BATCH, KEYS, groups, HEAD), rng.normal(size=(BATCH, KEYS, groups, HEAD))
  key_positions = np.stack([rng.permutation(12)[:KEYS] for _ in range(BATCH)])
  if whole:
    key_positions.sort(axis=1)
  valid = rng.random((BATCH, KEYS)) < 0.7
  valid[:, rng.integers(KEYS)] = True
  near = [rng.choice(p[ok], QUERIES) for p, ok in zip(key_positions, valid)]
  positions = np.stack(near) + rng.integers(0, reach, (BATCH, QUERIES))
  floats = (np.asarray(a, np.float32) for a in (x, q, k, v))
  return (*floats, positions.astype(np.int32), key_positions.astype(np.int32), valid)


def scores_of(q, k, i, t, head):
  """Of all keys, float64."""
  group = head // (HEADS // k.shape[2])
  return k[i, :, group].astype(np.float64) @ q[i, t, head] / np.sqrt(q.shape[-1])


def mask_of(arrays, window=None, most=None):
  """bool `[B, H, L, S]`, an entry at a time; and the least gap at which `most` cuts scores."""
  _, q, k, _, positions, key_positions, valid = arrays
  mask, gap = np.zeros((len(q), HEADS, q.shape[1], k.shape[1]), bool), np.inf
  for i, head, t in np.ndindex(mask.shape[:3]):
    for j in range(k.shape[1]):
      age = positions[i, t] - key_positions[i, j]
      mask[i, head, t, j] = valid[i, j] and age >= 0 and (window is None or age < window)
    if most is not None and mask[i, head, t].sum() > most:
      scores = np.where(mask[i, head, t], scores_of(q, k, i, t, head), -np.inf)
      order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
      mask[i, head, t] = np.isin(range(len(scores)), order[:most])
      gap = min(gap, scores[order[most - 1]] - scores[order[most]])
  return mask, gap


def masked_attention(arrays, mask):
  """Softmax over the entries of the mask, one query at a time, float64."""
  _, q, k, v, *_ = arrays
  out = np.zeros(q.shape)
  for i, head, t in np.ndindex(mask.shape[:3]):
    read = np.flatnonzero(mask[i, head, t])
    scores = scores_of(q, k, i, t, head)[read]
    weights = np.exp(scores - scores.max())
    out[i, t, head] = weights / weights.sum() @ v[i, read, head // (HEADS // k.shape[2])]
  return out


@given(SEEDS, SIZES)
@settings(deadline=None, max_examples=30)
def test_a_window_equals_dense_attention_under_its_mask(seed, sizes):
  groups, window = sizes
  arrays = arrays_of(seed, groups, window)
  y, _ = applied(method('sliding_window', window=window))({}, *arrays)
  assert_allclose(y, masked_attention(arrays, mask_of(arrays, window)[0]), atol=1e-5)


@given(SEEDS, SIZES)
@settings(deadline=None, max_examples=30)
def test_the_largest_scores_equal_dense_attention_under_their_mask(seed, sizes):
  groups, k = sizes
  arrays = arrays_of(seed, groups)
  mask, gap = mask_of(arrays, most=k)
  assume(gap > 1e-5)
  y, _ = applied(method('topk_keys', k=k))({}, *arrays)
  assert_allclose(y, masked_attention(arrays, mask), atol=1e-5)


@given(SEEDS, SIZES)
@settings(deadline=None, max_examples=30)
def test_of_equal_scores_the_earlier_keys_are_read(seed, sizes):
  groups, k = sizes
  arrays = arrays_of(seed, groups, whole=True)
  mask, gap = mask_of(arrays, most=k)
  assume(gap == 0)
  y, _ = applied(method('topk_keys', k=k))({}, *arrays)
  assert_allclose(y, masked_attention(arrays, mask), atol=1e-5)


@pytest.mark.parametrize(('name', 'field'), [('sliding_window', 'window'), ('topk_keys', 'k')])
def test_settings_that_cover_every_key_equal_full_attention(name, field):
  arrays = arrays_of(0, 2)
  reach = {'window': arrays[4].max() + 1, 'k': KEYS}[field]
  full, _ = applied(method('full'))({}, *arrays)
  for more in (0, 1):
    y, _ = applied(method(name, **{field: int(reach) + more}))({}, *arrays)
    assert_allclose(y, full, rtol=1e-6, atol=1e-6)
  less, _ = applied(method(name, **{field: 2}))({}, *arrays)
  assert np.abs(less - full).max() > 0.05


@pytest.mark.parametrize(
  ('name', 'fields', 'rule'),
  [('sliding_window', {'window': 3}, {'window': 3}), ('topk_keys', {'k': 2}, {'most': 2})],
)
def test_gradients_equal_finite_differences_and_skip_keys_that_are_not_read(name, fields, rule):
  arrays = arrays_of(5, 2, reach=3)
  mask, gap = mask_of(arrays, **rule)
  assert gap > 1e-3
  rng = np.random.default_rng(6)
  toward = [rng.normal(size=a.shape) for a in arrays[:4]]
  target = rng.normal(size=arrays[1].shape)
  run = applied(method(name, **fields))

  def by_hand(step):
    moved = [a + step * d for a, d in zip(arrays[:4], toward)]
    return (masked_attention((*moved, *arrays[4:]), mask) * target).sum()

  def loss(*floats):
    return jnp.sum(run({}, *floats, *arrays[4:])[0] * target)

  grads = jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays[:4])
  slope = sum(float((g * d).sum()) for g, d in zip(grads, toward))
  assert slope == pytest.approx((by_hand(1e-6) - by_hand(-1e-6)) / 2e-6, rel=1e-4)
  by_group = mask.reshape(BATCH, 2, HEADS // 2, QUERIES, KEYS).any(axis=(2, 3)).transpose(0, 2, 1)
  assert not by_group.all()
  assert_array_equal(np.abs(grads[3]).max(-1) > 0, by_group)
  assert not np.asarray(grads[2])[~by_group].any()


@pytest.mark.parametrize(('name', 'field'), [('sliding_window', 'window'), ('topk_keys', 'k')])
def test_a_query_without_other_keys_reads_its_own_and_has_finite_gradients(name, field):
  arrays = arrays_of(1, 4)
  *_, v, positions, key_positions, valid = arrays
  valid[0] = False
  run = applied(method(name, **{field: 2}))
  y, _ = run({}, *arrays)
  own = positions[0][:, None] == key_positions[0]
  assert own.any(1).any() and not own.any(1).all()
  for t, mine in enumerate(own):  # and one that is no key itself reads all alike
    want = v[0][mine if mine.any() else slice(None)].mean(0)
    assert_allclose(y[0, t], want, atol=1e-6)
  loss = lambda *floats: jnp.sum(jnp.square(run({}, *floats, *arrays[4:])[0]))  # noqa: E731
  grads = jax.grad(loss, argnums=(1, 2, 3))(*arrays[:4])
  assert all(np.isfinite(g).all() and np.abs(g).any() for g in grads)


def inner_window(window):
  """What `config.attention.inner` supplies."""
  spec = method('full').spec
  return functools.partial(
    slots.method('attention', 'sliding_window'), spec=spec, window=window, name='inner'
  )


GATED = {
  name: method('head_gate', estimator=name, inner=inner_window(4))
  for name in ('straight_through', 'soft')
}


def router(seed, bias=0.0):
  kernel = np.random.default_rng(seed).normal(0, 0.5, (WIDTH, HEADS)).astype(np.float32)
  return {'params': {'router': {'kernel': kernel, 'bias': np.full(HEADS, bias, np.float32)}}}


def sigmoid(logits):
  return 1 / (1 + np.exp(-logits))


@given(SEEDS, st.sampled_from(list(GATED)))
@settings(deadline=None, max_examples=20)
def test_open_heads_are_those_with_a_positive_logit_and_closed_ones_add_nothing(seed, estimator):
  arrays, variables = arrays_of(seed, 2), router(seed, 0.3)
  logits = arrays[0].astype(np.float64) @ variables['params']['router']['kernel'] + 0.3
  assume(np.abs(logits).min() > 1e-4)
  y, sown = applied(GATED[estimator])(variables, *arrays)
  weight = np.where(logits > 0, sigmoid(logits) if estimator == 'soft' else 1, 0)
  inner = masked_attention(arrays, mask_of(arrays, window=4)[0])
  assert_allclose(y, inner * weight[..., None], atol=1e-5)
  assert not np.asarray(y)[logits < 0].any()
  assert np.mean(sown['gates']['active']) == pytest.approx((logits > 0).mean())


def test_heads_that_are_all_open_or_closed_equal_the_inner_attention_or_nothing():
  arrays = arrays_of(2, 2)
  run = applied(GATED['straight_through'])
  inner, _ = applied(method('sliding_window', window=4))({}, *arrays)
  y, sown = run(router(0, 50.0), *arrays)
  assert_allclose(y, inner, rtol=1e-6, atol=1e-6)
  assert np.mean(sown['gates']['active']) == 1 and np.abs(y).min() > 0
  y, sown = run(router(0, -50.0), *arrays)
  assert not y.any() and np.mean(sown['gates']['active']) == 0


def test_a_straight_through_gates_router_gets_the_sigmoids_gradient():
  arrays, variables = arrays_of(3, 2), router(3)
  run, target = applied(GATED['straight_through'], 'train'), np.ones((HEADS, HEAD)).cumsum(-1)

  def loss(params, *floats):
    return jnp.sum(run({'params': params}, *floats, *arrays[4:])[0] * target)

  to_params, *others = jax.grad(loss, argnums=range(5))(variables['params'], *arrays[:4])
  assert all(np.isfinite(g).all() and np.abs(g).any() for g in others)
  x = arrays[0].astype(np.float64)
  p = sigmoid(x @ variables['params']['router']['kernel'])
  inner = masked_attention(arrays, mask_of(arrays, window=4)[0])
  to_logits = (inner * target).sum(-1) * p * (1 - p)  # of closed heads too
  want = {'kernel': np.einsum('bld,blh->dh', x, to_logits), 'bias': to_logits.sum((0, 1))}
  assert (p < 0.5).any() and (p > 0.5).any()
  for name, got in to_params['router'].items():
    assert_allclose(got, want[name], rtol=1e-4, atol=1e-5, err_msg=name)


WINDOW, TOPK = {'name': 'sliding_window', 'window': 3}, {'name': 'topk_keys', 'k': 2}
GATE = {'name': 'head_gate', 'inner': WINDOW}


def model_of(attention):
  return lm.from_config(config_of(**attention), VOCAB)


def random_params(model):
  rng = np.random.default_rng(0)
  shapes = plan_of(model).params
  return jax.tree.map(lambda a: rng.normal(0, 0.4, a.shape).astype(np.float32), shapes)


@functools.cache
def logits_of(model):
  return jax.jit(lambda params, tokens: model.apply({'params': params}, tokens))


@pytest.mark.parametrize('attention', [WINDOW, TOPK, GATE], ids=lambda a: a['name'])
def test_a_later_token_changes_no_earlier_output(attention):
  model = model_of(attention)
  params, run = random_params(model), logits_of(model)
  tokens = np.random.default_rng(1).integers(0, VOCAB, (BATCH, CONTEXT))
  logits = run(params, tokens)
  for cut in range(1, CONTEXT):
    other = run(params, np.where(np.arange(CONTEXT) < cut, tokens, (tokens + 5) % VOCAB))
    assert_allclose(other[:, :cut], logits[:, :cut], rtol=1e-6, atol=1e-6)
    assert (np.abs(other - logits)[:, cut:].max(-1) > 1e-3).all()


def test_a_token_reaches_one_window_further_in_each_layer():
  model = model_of(WINDOW)
  params, run = random_params(model), logits_of(model)
  tokens = np.random.default_rng(2).integers(0, VOCAB, (1, CONTEXT))
  other = np.where(np.arange(CONTEXT) == 1, (tokens + 5) % VOCAB, tokens)
  moved = np.abs(run(params, other) - run(params, tokens)).max(-1)[0]
  assert (moved[1 : 2 + LAYERS * 2] > 1e-4).all()
  assert_allclose(moved[[0, 6, 7]], 0, atol=1e-6)


def test_a_gate_wraps_the_attention_that_the_config_names_inside():
  gated, plain = model_of(GATE), model_of(WINDOW)
  params = random_params(gated)
  for layer in range(LAYERS):
    attention = params[f'block_{layer}']['attention']
    attention['attention']['router']['bias'] += 100
  tokens = np.random.default_rng(3).integers(0, VOCAB, (BATCH, CONTEXT))
  logits = logits_of(gated)(params, tokens)
  assert_allclose(logits_of(plain)(params, tokens), logits, rtol=1e-5, atol=1e-5)
  assert np.abs(logits_of(model_of({'name': 'full'}))(params, tokens) - logits).max() > 0.1


@pytest.mark.parametrize('length', [1, 3, 5, CONTEXT])
@pytest.mark.parametrize(('attention', 'rule'), [(WINDOW, {'window': 3}), (TOPK, {'most': 2})])
def test_the_ledger_counts_the_entries_of_the_mask(attention, rule, length):
  rng = np.random.default_rng(4)
  where = np.arange(length)[None]
  q, k = rng.normal(size=(1, length, HEADS, HEAD)), rng.normal(size=(1, length, 2, HEAD))
  arrays = (None, q, k, None, where, where, np.ones((1, length), bool))
  share = mask_of(arrays, **rule)[0].sum() / mask_of(arrays)[0].sum()
  notes = plans.ledger(model_of(attention), length)
  dense = 2 * WIDTH * length  # of a token's heads with every key
  assert notes[f'{PATH}/values'].flops == pytest.approx(dense * share)
  scored = 1 if attention is TOPK else share  # top-k has to see every score
  assert notes[f'{PATH}/scores'].flops == pytest.approx(dense * scored)
  assert (share < 1) == (length > max(rule.values()))
  # By the other convention, the very pairs that are read.
  exact = cost.causal_pairs(notes)
  read, causal = (2 * HEAD * mask_of(arrays, **r)[0].sum() / length for r in (rule, {}))
  assert exact[f'{PATH}/values'].flops == pytest.approx(read)
  assert exact[f'{PATH}/scores'].flops == pytest.approx(causal if attention is TOPK else read)
  full = cost.causal_pairs(plans.ledger(model_of({'name': 'full'}), length))
  assert full[f'{PATH}/values'].flops == full[f'{PATH}/scores'].flops == pytest.approx(causal)


def test_a_gate_of_heads_can_skip_scores_values_and_output_and_nothing_else():
  gated, plain = (plans.ledger(model_of(a), CONTEXT) for a in (GATE, WINDOW))
  gates = {path: matmul.gates for path, matmul in gated.items() if path.startswith('block_0')}
  skipped = f'{PATH}/inner/scores', f'{PATH}/inner/values', 'block_0/attention/out/linear'
  assert all(
    gates.pop(path) == (cost.Gate(path=PATH, planned=1.0, controlled=True, skips=False),)
    for path in skipped
  )
  assert f'{PATH}/router/linear' in gates and not any(gates.values())
  for name in ('scores', 'values'):
    assert gated[f'{PATH}/inner/{name}'].flops == plain[f'{PATH}/{name}'].flops
  assert gated[f'{PATH}/router/linear'].flops == 2 * WIDTH * HEADS


@pytest.mark.parametrize(
  ('attention', 'value', 'valid'),
  [
    ({'name': 'topk_keys', 'k': CONTEXT + 1}, 'k=9', '1 to config.data.context, 8'),
    ({'name': 'head_gate', 'estimator': 'softt'}, "'softt': did you mean 'soft'?", 'gumbel_sig'),
  ],
)
def test_bad_fields_are_refused_in_one_line(attention, value, valid):
  with pytest.raises(UserError) as refused:
    model_of(attention)
  message = str(refused.value)
  field = next(name for name in attention if name != 'name')
  assert f'config.attention.{field}' in message and value in message
  assert f'valid: {valid}' in message and '\n' not in message


def test_fields_at_the_ends_of_their_ranges_are_accepted():
  for attention in (
    {'name': 'sliding_window', 'window': 1},
    TOPK | {'k': 1},
    TOPK | {'k': CONTEXT},
  ):
    assert plan_of(model_of(attention)).variables
