"""Mixtures of experts against loops over tokens in NumPy."""

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
from sparse_lm.kernels import grouped_matmul
from sparse_lm.layers.spec import Spec
from sparse_lm.model import slots
from sparse_lm.plan import executed

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS = 3, 8, 8, 12, 4
TOKENS = BATCH * LENGTH
SOWN = ('losses', 'stats', 'gates')
RELU2 = functools.partial(slots.method('activation', 'relu2'), name='activation')
SEEDS = st.integers(0, 2**31)


def module(precision='float32', **fields):
  config = base.get_config()
  config.model.update({'width': WIDTH, 'hidden': HIDDEN, 'bias': True, 'precision': precision})
  spec = Spec.from_config(config.model, vocab=11, context=LENGTH)
  cls = slots.method('mlp', 'moe_topk')
  return cls(spec=spec, activation=RELU2, **{'experts': EXPERTS, **fields})


# 24 tokens want 12 seats each on average (6 with k = 1); the tight ones have half of that.
TOP2 = module(k=2, capacity=0.5)
TOP1 = module(k=1, capacity=0.5)


@functools.cache
def applied(mlp, mode):
  """`(variables, x, rngs) -> (y, what was sown)`."""
  return jax.jit(lambda v, x, rngs=None: mlp.apply(v, x, mode, rngs=rngs, mutable=SOWN))


@functools.cache
def shapes(mlp):
  x = jnp.zeros((BATCH, LENGTH, WIDTH))
  return jax.eval_shape(lambda: mlp.init(jax.random.key(0), x, 'eval'))


def numbers(mlp, seed):
  """Random variables and inputs."""
  draw = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda a: draw.normal(0, 0.5, a.shape).astype(np.float32), shapes(mlp)['params']
  )
  return {'params': params}, draw.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)


def alike(variables):
  """The same variables with every expert a copy of the first."""
  experts = jax.tree.map(lambda a: np.repeat(a[:1], len(a), 0), variables['params']['experts'])
  return {**variables, 'params': {**variables['params'], 'experts': experts}}


def probabilities(params, x):
  logits = x.astype(np.float64) @ params['router']['kernel'].astype(np.float64)
  odds = np.exp(logits)
  return odds / odds.sum(-1, keepdims=True)


def expert(params, e, x):
  p = params['experts']
  h = np.maximum(x.astype(np.float64) @ p['up'][e] + p['up_bias'][e], 0) ** 2
  return h @ p['down'][e] + p['down_bias'][e]


def decided(scores, rank):
  """Whether float32 rounding cannot change who is among the first `rank` of the last axis."""
  ordered = -np.sort(-scores, axis=-1)
  return rank == scores.shape[-1] or (ordered[..., rank - 1] - ordered[..., rank]).min() > 1e-5


def token_choice(params, x_BxLxD, k, capacity):
  """Output, pairs that asked for each expert, and pairs dropped; `capacity` is a count of seats."""
  y, load, dropped = np.zeros(x_BxLxD.shape), np.zeros(EXPERTS, int), 0
  probability = probabilities(params, x_BxLxD)
  for l in range(LENGTH):  # position first, then sequence, then choice
    for b in range(BATCH):
      p = probability[b, l]
      chosen = np.argsort(-p, kind='stable')[:k]
      for e in chosen:
        if load[e] < capacity:
          weight = p[e] / p[chosen].sum() if k > 1 else p[e]
          y[b, l] += weight * expert(params, e, x_BxLxD[b, l])
        else:
          dropped += 1
        load[e] += 1
  return y, load, dropped


def auxiliary(params, x, load, balance=0.01, z=0.001):
  """Switch's balance loss, equation 4, and ST-MoE's z-loss, equation 5."""
  mean = probabilities(params, x).mean((0, 1))
  logits = x.astype(np.float64) @ params['router']['kernel']
  return {
    'balance': balance * EXPERTS * (load / load.sum() * mean).sum(),
    'z': z * (np.log(np.exp(logits).sum(-1)) ** 2).mean(),
  }


def observed(params, x, load, dropped):
  p = probabilities(params, x)
  return {
    'load': load / max(load.sum(), 1),
    'max_violation': load.max() / load.mean() - 1,
    'entropy': -(p * np.log(p)).sum(-1).mean(),
    'drop_rate': dropped / load.sum(),
    'dead_experts': (load == 0).mean(),
    'closed': float(load.sum() == 0),
  }


def close(got, want, scale=1e-5):
  assert_allclose(got, want, rtol=1e-4, atol=scale * max(np.abs(want).max(), 1))


def sown_equals(got, want):
  assert got.keys() == want.keys()
  for name in want:
    assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


@given(SEEDS, st.sampled_from([0.5, 3.0]))
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize(('mlp', 'seats'), [(TOP1, 3), (TOP2, 6)], ids=['k=1', 'k=2'])
def test_training_equals_a_loop_with_slots_by_position_then_sequence(mlp, seats, seed, sharp):
  variables, x = numbers(mlp, seed)
  params = variables['params']
  params['router']['kernel'] *= sharp
  assume(decided(probabilities(params, x), mlp.k))
  y, sown = applied(mlp, 'train')(variables, x)
  want, load, dropped = token_choice(params, x, mlp.k, seats)
  assert dropped > 0
  close(y, want)
  sown_equals(sown['losses'], auxiliary(params, x, load))
  sown_equals(sown['stats'], observed(params, x, load, dropped))
  assert np.mean(sown['gates']['active']) == pytest.approx(1 - dropped / load.sum())


@given(SEEDS)
@settings(deadline=None, max_examples=15)
@pytest.mark.parametrize('executor', ['sort', 'einsum'])
def test_evaluation_drops_nothing_and_sows_no_loss(executor, seed):
  variables, x = numbers(TOP2, seed)
  assume(decided(probabilities(variables['params'], x), 2))
  y, sown = applied(TOP2.clone(executor=executor), 'eval')(variables, x)
  want, load, dropped = token_choice(variables['params'], x, 2, TOKENS)
  close(y, want)
  sown_equals(sown['stats'], observed(variables['params'], x, load, dropped))
  assert np.mean(sown['gates']['active']) == 1 and dropped == 0 and 'losses' not in sown


def test_gradients_of_both_executors_equal_finite_differences_of_the_loop():
  variables, x = numbers(TOP2, 3)
  params = jax.tree.map(lambda a: a.astype(np.float64), variables['params'])
  draw = np.random.default_rng(4)
  toward = jax.tree.map(lambda a: draw.standard_normal(a.shape), params)
  aside, target = draw.standard_normal((2, *x.shape))

  def by_hand(step):
    moved = jax.tree.map(lambda a, d: a + step * d, params, toward)
    y, load, _ = token_choice(moved, x + step * aside, 2, 6)
    return (y * target).sum() + sum(auxiliary(moved, x + step * aside, load).values())

  for executor in ('sort', 'einsum'):
    run = applied(module(k=2, capacity=0.5, executor=executor), 'train')

    @jax.jit
    def loss(params, x, run=run):
      y, sown = run({'params': params}, x)
      return jnp.sum(y * target) + sum(jax.tree.leaves(sown['losses']))

    to_params, to_x = jax.grad(loss, argnums=(0, 1))(variables['params'], x)
    slopes = jax.tree.map(lambda g, d: (g * d).sum(), to_params, toward)
    slope = sum(jax.tree.leaves(slopes)) + (to_x * aside).sum()
    want = (by_hand(1e-6) - by_hand(-1e-6)) / 2e-6
    assert float(slope) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize(('experts', 'k'), [(4, 2), (4, 1), (1, 1)])
def test_identical_experts_with_room_equal_one_mlp(experts, k, mode):
  mlp = module(experts=experts, k=k, capacity=float(experts))
  variables, x = numbers(mlp, 6)
  variables = alike(variables)
  want = expert(variables['params'], 0, x)
  if k == 1:  # an expert's output is weighted by its probability
    want *= probabilities(variables['params'], x).max(-1, keepdims=True)
    y, _ = applied(mlp, mode)(variables, x)
  else:  # whatever the weights are; the router's inputs are jittered, the experts' are not
    y, _ = applied(mlp, mode)(variables, x, {'gates': jax.random.key(0)})
  close(y, want, scale=1e-6)


def routed_to(targets, strength=40.0):
  """Variables and inputs in which token i goes to expert `targets[i]` with near certainty."""
  variables, _ = numbers(TOP1, 7)
  variables['params']['router']['kernel'] = strength * np.eye(WIDTH, EXPERTS, dtype=np.float32)
  return variables, np.eye(WIDTH, dtype=np.float32)[targets].reshape(BATCH, LENGTH, WIDTH)


def balance_loss(variables, x):
  return float(applied(TOP1, 'train')(variables, x)[1]['losses']['balance'])


def test_balance_loss_is_its_coefficient_at_uniform_routing():
  variables, x = routed_to(np.arange(TOKENS) % EXPERTS)
  assert balance_loss(variables, x) == pytest.approx(0.01, rel=1e-6)
  # So it is where all probabilities are equal, whoever the ties go to.
  variables['params']['router']['kernel'] *= 0
  _, sown = applied(TOP1, 'train')(variables, x)
  assert float(sown['losses']['balance']) == pytest.approx(0.01, rel=1e-6)
  assert float(sown['losses']['z']) == pytest.approx(0.001 * np.log(4) ** 2, rel=1e-5)


def test_imbalanced_routing_costs_more_than_balanced():
  crowd = [np.where(np.arange(TOKENS) < n, 0, np.arange(TOKENS) % 4) for n in (0, 8, 16, 24)]
  costs = [balance_loss(*routed_to(targets)) for targets in crowd]
  assert costs == sorted(costs) and costs[0] < 0.8 * costs[1]
  assert costs[-1] == pytest.approx(0.01 * EXPERTS, rel=1e-5)  # one expert has all


@pytest.mark.parametrize('mlp', [TOP1, TOP2], ids=['k=1', 'k=2'])
def test_a_full_expert_drops_no_token_for_a_later_one(mlp):
  variables, x = numbers(mlp, 8)
  run = applied(mlp, 'train')
  y, sown = run(variables, x)
  assert float(sown['stats']['drop_rate']) > 0.3
  for cut in (1, 2, 4):
    # In all sequences the later tokens crowd the experts, one after the other.
    for favourite in variables['params']['router']['kernel'].T:
      other = x.copy()
      other[:, cut:] = 3 * favourite
      moved, _ = run(variables, other)
      assert_array_equal(moved[:, :cut], y[:, :cut])
      assert np.abs(moved - y).max() > 0.01


def test_evaluation_does_not_depend_on_the_rest_of_the_batch():
  variables, x = numbers(TOP2, 9)
  alone, _ = applied(TOP2, 'eval')(variables, np.repeat(x[:1], BATCH, 0))
  together, _ = applied(TOP2, 'eval')(variables, x)
  assert_allclose(together[0], alone[2], rtol=1e-5, atol=1e-5)
  assert np.abs(together[1] - alone[1]).max() > 0.1


def test_the_router_computes_in_float32_in_a_bfloat16_model():
  mlp = module('bfloat16', k=2)
  variables, x = numbers(mlp, 10)
  x_bfloat16 = jnp.asarray(x, jnp.bfloat16)
  y, sown = applied(mlp, 'train')(variables, x_bfloat16)
  assert y.dtype == jnp.bfloat16
  x = np.asarray(x_bfloat16, np.float64)
  # bfloat16 has 8 bits: these would be wrong in the third digit.
  want = auxiliary(variables['params'], x, np.asarray(sown['stats']['load']))
  assert_allclose(sown['losses']['z'], want['z'], rtol=1e-6)
  assert_allclose(sown['losses']['balance'], want['balance'], rtol=1e-6)
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(sown))


def test_jitter_scales_the_routers_inputs_in_training_only():
  mlp = module(jitter=0.25)
  variables, x = numbers(mlp, 11)
  variables['params']['router']['kernel'] = np.eye(WIDTH, EXPERTS, dtype=np.float32)
  ratios = {}
  for mode in ('train', 'eval'):
    _, seen = mlp.apply(
      variables, x, mode, rngs={'gates': jax.random.key(0)}, capture_intermediates=True
    )
    logits = seen['intermediates']['router']['__call__'][0].reshape(LENGTH, BATCH, EXPERTS)
    ratios[mode] = logits.transpose(1, 0, 2) / x[..., :EXPERTS]
  assert_allclose(ratios['eval'], 1, rtol=1e-6)
  drawn = np.asarray(ratios['train'])
  assert 0.75 <= drawn.min() < 0.77 and 1.23 < drawn.max() <= 1.25
  assert drawn.std() == pytest.approx(0.5 / 12**0.5, rel=0.1)  # of the uniform distribution


def test_jittered_inputs_are_rounded_to_the_compute_dtype_and_routed_in_float32():
  mlp = module('bfloat16', jitter=0.01)
  variables, x = numbers(mlp, 11)
  variables['params']['router']['kernel'] = np.eye(WIDTH, EXPERTS, dtype=np.float32)
  x = jnp.asarray(x, jnp.bfloat16)
  _, seen = mlp.apply(
    variables, x, 'train', rngs={'gates': jax.random.key(0)}, capture_intermediates=True
  )
  logits = seen['intermediates']['router']['__call__'][0]
  assert logits.dtype == jnp.float32
  assert_array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))
  ratio = logits.reshape(LENGTH, BATCH, EXPERTS).transpose(1, 0, 2) / x[..., :EXPERTS]
  assert 0.003 < np.abs(ratio - 1).max() <= 0.01 + 2**-8 * 1.01


def test_the_ledger_counts_k_experts_a_token_whatever_the_empty_slots():
  variables, x = numbers(TOP2, 12)
  notes = executed.trace(lambda x: TOP2.apply(variables, x, 'eval'), x).ledger
  each, router = 2 * TOKENS * 2 * WIDTH * HIDDEN, 2 * TOKENS * WIDTH * EXPERTS
  names = 'router/linear', 'experts/up/linear', 'experts/down/linear'
  found = {path: matmul.flops for path, matmul in notes.items() if matmul.kind != 'bias'}
  assert found == dict(zip(names, (router, each, each)))


@pytest.mark.parametrize(
  ('fields', 'value', 'valid'),
  [
    ({'k': 5}, 'k=5', '1 to the number of experts, 4'),
    ({'capacity': 0.4}, 'capacity=0.4', '0.5 or more'),
    ({'eval_capacity': 0.2, 'k': 2}, 'eval_capacity=0.2', '0.25 or more'),
    ({'executor': 'einsums'}, "executor 'einsums'", 'einsum, sort'),
  ],
)
def test_bad_fields_are_refused_in_one_line(fields, value, valid):
  with pytest.raises(UserError) as refused:
    module(**fields).check()
  message = str(refused.value)
  assert f'config.mlp.{value}' in message and f'valid: {valid}' in message
  assert '\n' not in message
  assert 'executor' not in fields or "did you mean 'einsum'?" in message


def test_fields_at_the_ends_of_their_ranges_are_accepted():
  for fields in ({'k': 4}, {'capacity': 0.5}, {'capacity': 0.0}, {'eval_capacity': 0.5}, {}):
    module(**fields).check()


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_on_a_gpu_nothing_is_sorted_and_experts_without_a_capacity_run_in_tiles(mode, monkeypatch):
  wide = TOP2.spec.__class__(**vars(TOP2.spec) | {'width': 16, 'hidden': 32})
  mlp = TOP2.clone(spec=wide)
  draw = np.random.default_rng(9)
  x = draw.standard_normal((64, 12, 16)).astype('f')

  def run(x):
    variables = mlp.init(jax.random.key(0), x, 'eval')
    apply = lambda params, x: mlp.apply({'params': params}, x, mode, mutable=SOWN)[0]  # noqa: E731
    y, pullback = jax.vjp(apply, variables['params'], x)
    return y, pullback(jnp.cos(y))

  def flops_have_a_reason():
    traced = executed.trace(lambda x: mlp.apply(shapes_of, x, mode, mutable=SOWN), x)
    assert (
      sum(traced.uncharged.values()) + sum(m.flops for m in traced.ledger.values()) == traced.flops
    )

  shapes_of = mlp.init(jax.random.key(0), x, 'eval')
  want = jax.jit(run)(x)
  monkeypatch.setattr(grouped_matmul, 'has_tiles', lambda: True)
  got = jax.jit(lambda x: run(x))(x)
  jax.tree.map(close, got, want)
  text = jax.jit(lambda x: run(x)).trace(x).lower(lowering_platforms=('cuda',)).as_text()
  # Two matrices, forward and backward: with a capacity they are batched products.
  assert text.count('xla.gpu.triton') == (6 if mode == 'eval' else 0)
  assert 'stablehlo.sort' not in text
  flops_have_a_reason()
