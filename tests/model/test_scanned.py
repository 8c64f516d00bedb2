"""Equal layers that run as one scan against the same layers one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core.scope import LazyRng
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.layers.draws import Dropout
from sparse_lm.layers.sow import SOWN
from sparse_lm.model import lm, scanned, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import executed, sites

VOCAB, LENGTH = 11, 16
NAMES = [(slot, name) for slot in slots.SLOTS if slot != 'weight' for name in slots.names(slot)]
# Draws, keys that a path decides, state that follows from a whole step; and every second layer another.
MIXED = {
  'model__layers': 4,
  'model__dropout': 0.2,
  'mlp__name': 'moe_balanced',
  'mlp__layers': '1::2',
  'depth__name': 'token_gate',
  'depth__estimator': 'random',
  'depth__open': 0.5,
}


def models(config):
  """The model that scans what it can, and the one that scans nothing."""
  model = lm.from_config(config, VOCAB)
  spec = model.spec
  return [
    model.clone(spec=dataclasses.replace(spec, scan_layers=how)) for how in ('always', 'never')
  ]


def tokens_of(batch=2):
  return jax.random.randint(jax.random.key(0), (batch, LENGTH), 0, VOCAB)


def variables_of(model, seed=0):
  """Parameters around those of a start: the head starts at zero, which would hide most mistakes."""
  variables = jax.jit(model.init)(jax.random.key(seed), tokens_of())
  draw = np.random.default_rng(seed)
  moved = jax.tree.map(
    lambda a: a + 0.3 * draw.normal(size=a.shape).astype(a.dtype), variables['params']
  )
  return {k: v for k, v in variables.items() if k not in SOWN} | {'params': moved}


def run(model, mode, variables):
  """The loss and all that a pass returns: logits, and what modules sow and change; in training with the
  gradient of the loss."""
  rngs = {'dropout': jax.random.key(3), 'gates': jax.random.key(4)} if mode == 'train' else None
  mutable = [*SOWN, *(name for name in variables if name != 'params')]

  def loss(params):
    given = {**variables, 'params': params}
    logits, left = model.apply(given, tokens_of(), mode=mode, rngs=rngs, mutable=mutable)
    auxiliary = sum(jax.tree.leaves(left.get('losses', {})), 0.0)
    return auxiliary + jnp.mean(jnp.square(logits)), (logits, left)

  if mode != 'train':
    return loss(variables['params'])
  return jax.value_and_grad(loss, has_aux=True)(variables['params'])


def matmuls(function, *arguments):
  """How many are traced: a scan's body once."""
  return str(jax.make_jaxpr(function)(*arguments)).count(' dot_general[')


def assert_same(found, want):
  assert jax.tree.structure(found) == jax.tree.structure(want)
  for path, value in tree.named(want).items():
    assert_allclose(tree.named(found)[path], value, rtol=2e-4, atol=2e-5, err_msg=path)


def assert_scanned_equals_unrolled(config, modes):
  model, unrolled = models(config)
  variables = variables_of(unrolled)
  for mode in modes:
    scan, plain = (functools.partial(run, m, mode) for m in (model, unrolled))
    assert matmuls(scan, variables) < matmuls(plain, variables)
    assert_same(jax.jit(scan)(variables), jax.jit(plain)(variables))


@pytest.mark.slow
def test_a_scan_of_pairs_draws_sows_and_learns_what_single_layers_do(tiny_config):
  assert_scanned_equals_unrolled(tiny_config(**MIXED), ('train', 'eval'))


@pytest.mark.slow  # one method of each kind is in the test above
@pytest.mark.parametrize(('slot', 'name'), NAMES)
def test_scanned_equals_unrolled(slot, name, tiny_config):
  fields = {'model__layers': 2, 'model__dropout': 0.2, f'{slot}__name': name}
  model = lm.from_config(tiny_config(**fields), VOCAB)
  assert_scanned_equals_unrolled(
    tiny_config(**fields), model.stack.traits(model.spec).scans or ('none',)
  )


@pytest.mark.slow
@pytest.mark.parametrize('estimator', ['reinforce', 'hard_concrete', 'gumbel_sigmoid'])
def test_gates_draw_alike_when_layers_are_computed_again(estimator, tiny_config):
  fields = {'depth__name': 'token_gate', 'depth__estimator': estimator, 'model__remat': 'full'}
  assert_scanned_equals_unrolled(tiny_config(model__layers=2, **fields), ('train',))


@pytest.mark.parametrize('kind', [Dropout, nn.Dropout])
def test_dropout_outside_of_a_scan_draws_what_flax_draws(kind):
  class Module(nn.Module):
    @nn.compact
    def __call__(self, x):
      drop = kind(0.5, deterministic=False)
      return drop(drop(x))

  key = jax.random.key(7)
  found = Module().apply({}, np.ones(64), rngs={'dropout': key})
  keys = [LazyRng(key, ('Dropout_0', number)).as_jax_rng() for number in (1, 2)]
  kept = [jax.random.bernoulli(own, 0.5, (64,)) for own in keys]
  assert_allclose(found, 4.0 * (kept[0] & kept[1]))


@pytest.mark.slow
def test_a_scan_may_be_mapped_over_models(tiny_config):
  model, unrolled = models(tiny_config(model__layers=3, model__dropout=0.2))
  variables = [variables_of(unrolled, seed) for seed in range(2)]
  both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
  found = jax.jit(jax.vmap(functools.partial(run, model, 'train')))(both)
  plain = jax.jit(functools.partial(run, unrolled, 'train'))
  for index, own in enumerate(variables):
    assert_same(jax.tree.map(lambda leaf, i=index: leaf[i], found), plain(own))


def test_what_is_traced_does_not_grow_with_the_layers(tiny_config):
  def traced(layers):
    model, _ = models(tiny_config(model__layers=layers))
    jaxpr = jax.make_jaxpr(functools.partial(run, model, 'train'))(plan_of(model).variables)
    return str(jaxpr)

  few, many = traced(8), traced(32)
  for operation in (' scan[', ' dot_general[', ' exp '):
    assert few.count(operation) == many.count(operation), operation
  assert few.count(' scan[') == 2  # forward and backward
  # What grows are the operands of stacks, and the slices of their gradients: of eight parameters a layer.
  assert many.count('\n') - few.count('\n') < 24 * 8 * 10


@given(st.lists(st.integers(0, 2), max_size=14), st.integers(2, 6))
def test_runs_are_as_long_as_they_can_be(kinds, least):
  layers = [10 + 2 * i for i in range(len(kinds))]  # some were removed
  found = list(scanned.split(layers, kinds, least))
  assert [layer for passes in found for group in passes for layer in group] == layers
  by_layer, first = dict(zip(layers, kinds)), 0
  for passes in found:
    groups = [[by_layer[layer] for layer in group] for group in passes]
    assert all(group == groups[0] for group in groups)
    covered = sum(map(len, groups))
    # By brute force: the longest repetition that begins here, if it is long enough.
    repeated = [
      end - first
      for size in range(1, len(kinds))
      for end in range(first + 2 * size, len(kinds) + 1, size)
      if kinds[first:end] == kinds[first : first + size] * ((end - first) // size)
    ]
    assert covered == max([n for n in repeated if n >= least], default=1)
    first += covered


def test_the_smallest_groups_are_scanned():
  split = functools.partial(scanned.split, least=2)
  assert list(split(range(4), 'aaaa')) == [((0,), (1,), (2,), (3,))]
  assert list(split(range(5), 'babab')) == [((0, 1), (2, 3)), ((4,),)]
  assert list(split(range(5), 'xaabb')) == [((0,),), ((1,), (2,)), ((3,), (4,))]


@pytest.mark.parametrize(
  ('device', 'layers', 'one_scan'), [('gpu', 32, True), ('gpu', 31, False), ('cpu', 32, False)]
)
def test_deep_stacks_are_scanned_by_default_but_on_a_cpu(
  device, layers, one_scan, tiny_config, monkeypatch
):
  model = lm.from_config(tiny_config(model__layers=layers), VOCAB)
  variables = plan_of(model).variables
  monkeypatch.setattr(jax, 'default_backend', lambda: device)
  found = matmuls(lambda v: model.apply(v, tokens_of()), variables)
  assert (found < 20) is one_scan


def test_the_backward_pass_of_a_scan_computes_no_matmul_again(tiny_config):
  model, unrolled = models(tiny_config(model__layers=3))
  variables = plan_of(unrolled).variables
  traced = [jax.make_jaxpr(functools.partial(run, m, 'train')) for m in (model, unrolled)]
  flops = [executed.count(trace(variables).jaxpr).flops for trace in traced]
  assert flops[0] == flops[1] > 0


def test_plans_and_sites_name_every_layer(tiny_config):
  model, unrolled = models(tiny_config(model__layers=3))
  plan, want = plan_of(model), plan_of(unrolled)
  assert plan.ledger == want.ledger and plan.sites == want.sites and plan.units == want.units
  variables, name = variables_of(unrolled), 'block_1/mlp/hidden'
  out, values = zip(*(sites.run(m, variables, tokens_of(), read=[name]) for m in (model, unrolled)))
  assert_allclose(*out, rtol=1e-5, atol=1e-6)
  assert_allclose(*[found[name] for found in values], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('patterns', 'alike'),
  [
    ((), True),
    (('block_*/mlp/hidden', '*/norm_1', 'residual_*'), True),
    (('block_*/mlp/hidden', 'block_1/*'), False),
    (('block_[02]/*',), False),
    (('block_?/mlp/hidden',), False),
  ],
)
def test_patterns_distinguish_layers_by_the_part_before_the_slash(patterns, alike):
  assert sites.alike(patterns) is alike


def test_a_site_method_of_one_layer_keeps_layers_single(tiny_config):
  fields = {'site__name': 'abs_topk', 'model__layers': 3}
  everywhere, _ = models(tiny_config(**fields, site__where=('block_*/mlp/hidden',)))
  here, _ = models(tiny_config(**fields, site__where=('block_1/mlp/hidden',)))
  variables = plan_of(everywhere).variables
  found = [
    matmuls(functools.partial(run, model, 'eval'), variables) for model in (everywhere, here)
  ]
  assert found[0] < found[1]


@pytest.mark.parametrize(
  ('fields', 'reason'),
  [
    (
      {'stack__name': 'layer_skip'},
      "config.stack.name='layer_skip' cannot train with scanned layers",
    ),
    (
      {'site__name': 'abs_topk', 'site__where': ('block_1/mlp/hidden',)},
      r"config.site.where=\('block_1/mlp/hidden',\) acts on some layers only",
    ),
    (
      {'model__layers': 1},
      r'no consecutive layers of the 1 \(config.model.layers\) are equal',
    ),
  ],
)
def test_a_required_scan_of_layers_that_differ_is_refused(fields, reason, tiny_config):
  with pytest.raises(UserError, match=f"scan_layers='always', but .*{reason}.*; valid: 'auto'"):
    given = {'model__layers': 3, 'model__scan_layers': 'always'} | fields
    lm.from_config(tiny_config(**given), VOCAB)
  with pytest.raises(UserError, match=r"config\.model\.scan_layers 'often'.*auto"):
    lm.from_config(tiny_config(model__scan_layers='often'), VOCAB)
