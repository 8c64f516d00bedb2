"""The plan of a model: everything from one trace, with loops counted as often as they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose

from sparse_lm.core import groups, tree
from sparse_lm.core.errors import UserError
from sparse_lm.layers.linear import Linear, fused_projections
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, plans
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost, record
from sparse_lm.plan.plan import read
from sparse_lm.runs import configs
from sparse_lm.runs.build import build, check_costs

DEPTH, WIDTH, HIDDEN = 4, 8, 12
MODEL = {
  'model.layers': DEPTH,
  'model.width': WIDTH,
  'model.hidden': HIDDEN,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.bias': True,
  'model.precision': 'float32',
  'model.attention_kernel': 'einsum',
}
SPEC = Spec.from_config(configs.load('configs/base.py', MODEL).model, 11, 8)


class Cell(nn.Module):
  """A gated MLP in the form that `nn.scan` takes: `(carry, None) -> (carry, None)`."""

  @nn.compact
  def __call__(self, x, _=None):
    axes = {'gate/kernel': -1, 'up/kernel': -1, 'down/kernel': -2}
    record.units(self.path, 'neuron', HIDDEN, axes)
    gate, up = fused_projections(self, SPEC, x, {'gate': HIDDEN, 'up': HIDDEN})
    with record.gated((*self.path, 'gate'), cost.Gating(planned=0.5)):
      h = record.site(self, 'hidden', jnp.tanh(gate) * up)
      return x + Linear(SPEC, WIDTH, name='down')(h), None


class Stack(nn.Module):
  """`DEPTH` cells, in a loop or one by one."""

  loop: bool
  axis: int = 0

  @nn.compact
  def __call__(self, x):
    if self.loop:
      scan = nn.scan(
        Cell, variable_axes={'params': self.axis}, split_rngs={'params': True}, length=DEPTH
      )
      return scan(name='cells')(x, None)[0]
    for layer in range(DEPTH):
      x, _ = Cell(name=f'block_{layer}')(x)
    return x


X = jnp.ones((2, 3, WIDTH))


def plan_of_stack(**fields):
  stack = Stack(**fields)
  return read(lambda key: stack.init_with_output(key, X), X.shape[0] * X.shape[1])


def flops_by_kernel(ledger, density=1.0):
  """FLOPs at the planned gates, summed over the layers, by the kernel's path in its layer."""
  found = {}
  for m in ledger.values():
    name = m.kernel.partition('/')[2]
    share = cost.forward_flops({'': m}, {m.kernel: density})
    found[name] = found.get(name, 0.0) + share
  return found


def test_the_ledger_of_a_scanned_stack_equals_the_unrolled_one():
  scanned, unrolled = (plan_of_stack(loop=loop).ledger for loop in (True, False))
  one = 2 * WIDTH * HIDDEN * DEPTH  # per token
  want = {'gate/kernel': one, 'up/kernel': one, 'down/kernel': one / 2}
  assert flops_by_kernel(scanned) == flops_by_kernel(unrolled) == want
  assert flops_by_kernel(scanned, 0.25) == flops_by_kernel(unrolled, 0.25)
  assert (len(scanned), len(unrolled)) == (3, 3 * DEPTH)
  assert {m.kernel for m in scanned.values()} == {f'cells/{name}' for name in want}


def test_units_in_a_loop_are_those_of_all_its_passes():
  scanned, unrolled = (plan_of_stack(loop=loop) for loop in (True, False))
  draw = np.random.default_rng(0)
  stacked = {path: draw.normal(size=a.shape).astype('f') for path, a in scanned.shapes.items()}
  apart = {
    path.replace('cells', f'block_{layer}'): array[layer]
    for path, array in stacked.items()
    for layer in range(DEPTH)
  }
  assert {path: a.shape for path, a in apart.items()} == {
    path: a.shape for path, a in unrolled.shapes.items()
  }
  (group,) = scanned.units
  *each, layers = unrolled.units
  assert (group.name, group.units) == ('cells/neuron', DEPTH * HIDDEN)
  assert [g.name for g in each] == [f'block_{i}/neuron' for i in range(DEPTH)]
  assert (layers.kind, layers.units) == ('layer', DEPTH)
  want = np.concatenate([groups.pool(g, apart) for g in each])
  assert_allclose(groups.pool(group, stacked), want, rtol=1e-6)
  # And back: every unit's value stands at the weights of its own layer.
  values = draw.normal(size=group.units).astype('f')
  shapes = {path: a.shape for path, a in stacked.items()}
  spread = groups.expand(group, values, shapes)
  for layer, own in enumerate(each):
    part = values[layer * HIDDEN : (layer + 1) * HIDDEN]
    alone = groups.expand(own, part, {path: a.shape for path, a in apart.items()})
    for path, array in alone.items():
      assert_allclose(spread[path.replace(f'block_{layer}', 'cells')][layer], array)


def test_what_a_loop_stacks_is_not_packable_and_the_rest_is():
  scanned, unrolled = (plan_of_stack(loop=loop) for loop in (True, False))
  assert scanned.packable == () and scanned.fused == {}
  assert set(unrolled.packable) == set(unrolled.shapes)  # kernels and biases
  assert unrolled.fused == {
    f'block_{i}/gate_up': (f'block_{i}/gate', f'block_{i}/up') for i in range(DEPTH)
  }


def test_sites_in_a_loop_have_the_shape_of_one_pass():
  scanned, unrolled = (plan_of_stack(loop=loop) for loop in (True, False))
  names = [f'{name}/{end}' for name in ('gate', 'up') for end in ('input', 'output')]
  names += ['hidden', 'down/input', 'down/output']
  assert list(scanned.sites) == [f'cells/{name}' for name in names]
  assert list(unrolled.sites) == [f'block_{i}/{n}' for i in range(DEPTH) for n in names]
  assert scanned.sites['cells/hidden'].shape == (2, 3, HIDDEN)
  assert scanned.inputs['cells/down/kernel'].name == 'cells/down/input'


def test_units_that_a_loop_stacks_along_another_axis_are_refused():
  with pytest.raises(UserError, match=r'cells/neuron cannot be .*\[8, 12\] to \[8, 4, 12\]') as e:
    plan_of_stack(loop=True, axis=1)
  assert '\n' not in str(e.value) and "valid: variable_axes={'params': 0}" in str(e.value)


def test_a_copied_layer_is_not_packable_and_is_charged_for_every_copy():
  copies = nn.vmap(
    Linear, variable_axes={'params': 0}, split_rngs={'params': True}, axis_size=3, in_axes=None
  )(SPEC, 5)
  plan = read(lambda key: copies.init_with_output(key, X), 6)
  assert plan.shapes['kernel'].shape == (3, WIDTH, 5) and plan.packable == ()
  assert [m.flops for m in plan.ledger.values()] == [3 * 2 * WIDTH * 5]


class Twice(nn.Module):
  """One layer that is called twice."""

  @nn.compact
  def __call__(self, x):
    layer = Linear(SPEC, WIDTH, name='own')
    return layer(layer(x))


def test_a_layer_that_runs_twice_is_charged_twice_and_packable_once():
  plan = read(lambda key: Twice().init_with_output(key, X), 6)
  assert [m.flops for m in plan.ledger.values()] == [2 * 2 * WIDTH * WIDTH]
  assert plan.packable == ('own/kernel', 'own/bias')


# The language model's.


def test_the_plan_holds_the_shapes_that_initialisation_makes(tiny_config):
  model = lm.from_config(tiny_config(mlp__name='expert_choice', model__tied=True), vocab=11)
  plan = plan_of(model)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
  made = {name: jax.tree.map(jnp.shape, variables[name]) for name in ('params', 'router')}
  assert jax.tree.map(lambda a: a.shape, dict(plan.variables)) == made
  named = tree.named(variables['params'])
  assert {path: a.shape for path, a in plan.shapes.items()} == {
    p: a.shape for p, a in named.items()
  }


def test_building_traces_the_initialisation_of_a_model_once(tiny_config, monkeypatch):
  traced = []

  def noted(init, *arguments):
    traced.append(init)
    return read(init, *arguments)

  monkeypatch.setattr(plans, 'read', noted)
  plan_of.cache_clear()
  config = tiny_config(mlp__name='moe_topk', model__hidden=24)
  check_costs(config)
  assert len(traced) == 2  # the model and its dense twin, of one token
  program, _ = build(config, 13)
  assert len(traced) == 3
  assert program.objective.costs.ledger is plan_of(program.model).ledger
  assert program.objective.costs.dense > 0 and len(traced) == 4  # the twin's
  assert plan_of(lm.from_config(config, 13)) is plan_of(program.model) and len(traced) == 4


def test_ledgers_of_other_lengths_are_traced_with_the_same_variables(tiny_config):
  model = lm.from_config(tiny_config(), vocab=11)
  short = plans.ledger(model, 8)
  longer = lm.from_config(tiny_config(data__context=8), vocab=11)
  assert short == plan_of(longer).ledger != plan_of(model).ledger
