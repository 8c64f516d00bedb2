"""Counting the matmuls of traced programs, against closed forms, XLA's own count and unrolled loops."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.core.errors import UserError
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import cost, executed, record
from sparse_lm.runs import configs

N = 4
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)
ONCE = 2 * N**3  # FLOPs of one product of such matrices


def flops(function, *arguments):
  return executed.count(jax.make_jaxpr(function)(*arguments).jaxpr).flops


def xla_flops(function, *arguments):
  """XLA's count before any optimization; it holds elementwise operations too."""
  return jax.jit(function).lower(*arguments).cost_analysis()['flops']


sizes = st.integers(1, 5)


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes, max_size=2), st.lists(sizes, max_size=2), sizes, sizes)
def test_a_product_costs_two_for_every_multiplication(batch, contracted, left, right):
  letters = iter('abcdefgh')
  b, k = ([next(letters) for _ in axes] for axes in (batch, contracted))
  m, n = next(letters), next(letters)
  b, k = ''.join(b), ''.join(k)
  shapes = (*batch, left, *contracted), (*contracted, *batch, right)
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  product = functools.partial(jnp.einsum, f'{b}{m}{k},{k}{b}{n}->{b}{m}{n}')
  want = 2 * math.prod((*batch, *contracted, left, right))
  # A product without a contracted axis may be written as one of elements.
  assert flops(product, *arrays) == want or not contracted


def convolution(x, kernel, groups):
  return jax.lax.conv_general_dilated(
    x, kernel, (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC'), feature_group_count=groups
  )


@pytest.mark.parametrize('groups', [1, 2])
def test_a_convolution_costs_what_xla_says(groups):
  x = jax.ShapeDtypeStruct((2, 9, 4), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 4 // groups, 6), jnp.float32)
  run = functools.partial(convolution, groups=groups)
  by_hand = 2 * (2 * 7 * 6) * (3 * 4 // groups)  # outputs, and inputs of each
  assert flops(run, x, kernel) == xla_flops(run, x, kernel) == by_hand


def test_a_ragged_product_costs_each_row_once():
  rows, kernels = jnp.ones((6, 4)), jnp.ones((3, 4, 5))
  assert flops(jax.lax.ragged_dot, rows, kernels, jnp.array([1, 2, 3])) == 2 * 6 * 4 * 5


def scanned(x):
  return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0]


def nested(x):
  return jax.lax.scan(lambda c, _: (scanned(c), None), x, None, length=3)[0]


def of_branches(x):
  branches = [lambda a: a, lambda a: a @ a @ a, lambda a: a @ a]
  return jax.lax.switch(jnp.int32(x[0, 0]), branches, x)


@jax.custom_jvp
def with_custom_jvp(x):
  return x @ x


with_custom_jvp.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0]))


@jax.custom_vjp
def with_custom_vjp(x):
  return x @ x


with_custom_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x,))


def until_small(x):
  return jax.lax.while_loop(lambda c: c[0, 0] > 1, lambda c: c @ c, x)


def halved(x):
  return jax.lax.while_loop(lambda c: c[0, 0] > 1, lambda c: c / 2, x) @ x


@pytest.mark.parametrize(
  ('function', 'products'),
  [
    (lambda x: x, 0),
    (scanned, 5),
    (nested, 15),
    (lambda x: jax.lax.fori_loop(2, 9, lambda i, c: c @ x, x), 7),
    (lambda x: jax.lax.map(lambda row: row @ x, x), 1),
    (of_branches, 2),  # the most expensive
    (jax.jit(lambda x: jax.jit(jnp.matmul)(x, x)), 1),
    (jax.checkpoint(lambda x: x @ x), 1),
    (with_custom_jvp, 1),
    (with_custom_vjp, 1),
    (jax.grad(lambda x: jnp.sum(with_custom_vjp(x))), 3),
    # Two forwards, of which one is computed again, and two backwards for each.
    (jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda a: jnp.sin(a @ x) @ x)(x))), 7),
    (lambda x: jax.vmap(lambda row: row @ x)(jnp.ones((6, N, N))), 6),
    (halved, 1),
  ],
)
def test_products_inside_count_as_often_as_they_run(function, products):
  assert flops(function, SQUARE) == products * ONCE


def test_loops_count_as_xla_counts_them_unrolled():
  def unrolled(x):
    for _ in range(15):
      x = x @ jnp.ones((N, N))
    return x

  assert flops(nested, SQUARE) == xla_flops(unrolled, SQUARE)


def test_loops_without_a_fixed_number_of_steps_are_refused():
  with pytest.raises(
    UserError, match=r"'while' run an unknown number of times.*valid: jax\.lax\.scan"
  ):
    flops(until_small, SQUARE)
  steps = lambda x, n: jax.lax.fori_loop(0, n, lambda i, c: c @ c, x)  # noqa: E731
  with pytest.raises(UserError, match="'while'"):
    flops(steps, SQUARE, 3)
  with pytest.raises(UserError, match='ffi_call'):
    flops(jax.ffi.ffi_call('no_such_target', SQUARE), SQUARE)


MODEL = {
  'model.layers': 1,
  'model.width': 8,
  'model.hidden': 12,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.precision': 'float32',
  'model.attention_kernel': 'einsum',
}
SPEC = Spec.from_config(configs.load('configs/base.py', MODEL).model, 11, 8)
DEPTH = 4


class Cell(nn.Module):
  """A layer in the form that `nn.scan` takes: `(carry, None) -> (carry, None)`."""

  @nn.compact
  def __call__(self, x, _=None):
    with record.gated(('gate',), cost.Gating(planned=0.5)):
      x = x + Linear(SPEC, SPEC.width, name='linear')(jnp.sin(x))
    return x, None


class Stack(nn.Module):
  """`DEPTH` cells: with parameters of their own or shared ones, in a loop or one by one."""

  loop: bool
  shared: bool
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    cell = nn.remat(Cell) if self.remat else Cell
    if self.loop:
      own = {'variable_axes': {'params': 0}}
      over = {'variable_broadcast': 'params'} if self.shared else own
      scan = nn.scan(cell, **over, split_rngs={'params': not self.shared}, length=DEPTH)
      return scan(name='cells')(x, None)[0]
    cells = [cell(name='cells')] * DEPTH if self.shared else [cell() for _ in range(DEPTH)]
    for one in cells:
      x, _ = one(x)
    return x


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('shared', [False, True])
def test_a_scanned_stack_is_charged_and_executed_as_the_unrolled_one(shared, remat):
  x = jnp.ones((2, 3, SPEC.width))
  found = []
  for loop in (True, False):
    stack = Stack(loop, shared, remat)
    variables = jax.eval_shape(stack.init, jax.random.key(0), x)
    found.append(executed.trace(stack.apply, variables, x))
  scan, unrolled = found
  want = DEPTH * 2 * x.size * SPEC.width
  assert scan.flops == unrolled.flops == want
  assert [sum(m.flops for m in traced.ledger.values()) for traced in found] == [want, want]
  # A stack's parameters are one kernel, of which a density and the gate hold for all layers.
  (entry,) = scan.ledger.values()
  assert entry == cost.Matmul(
    'linear', want, 'cells/linear/kernel', (cost.Gate(path='gate', planned=0.5),)
  )
  assert cost.forward_flops(scan.ledger, {'cells/linear/kernel': 0.25}) == want / 8
  assert len(unrolled.ledger) == (1 if shared else DEPTH)


def test_a_layer_under_vmap_is_charged_for_every_copy():
  copies = nn.vmap(
    Linear, variable_axes={'params': 0}, split_rngs={'params': True}, axis_size=3, in_axes=None
  )(SPEC, 5)
  x = jnp.ones((2, SPEC.width))
  variables = jax.eval_shape(copies.init, jax.random.key(0), x)
  traced = executed.trace(copies.apply, variables, x)
  (entry,) = traced.ledger.values()
  assert traced.flops == entry.flops == 3 * 2 * x.size * 5


def test_a_conditional_charges_the_branch_that_it_executes():
  def run(x):
    def branch(name, times, x):
      for _ in range(times):
        x = record.matmul(x @ x, (name,), 'linear', ONCE)
      return x

    branches = [functools.partial(branch, 'short', 1), functools.partial(branch, 'long', 3)]
    return jax.lax.switch(jnp.int32(x[0, 0]), branches, x)

  traced = executed.trace(run, SQUARE)
  assert {path: m.flops for path, m in traced.ledger.items()} == {'long/linear': traced.flops}
  assert traced.flops == 3 * ONCE


def test_one_matmul_behind_two_gates_in_turn_stays_two_entries():
  def run(x):
    for gate in ('a', 'b', 'a'):
      with record.gated((gate,), cost.Gating(planned=0.5)):
        x = record.matmul(x @ x, ('shared',), 'linear', ONCE, kernel='kernel')
    return x

  ledger = executed.trace(run, SQUARE).ledger
  assert cost.forward_flops(ledger, {}, {'a': 1.0, 'b': 0.0}) == 2 * ONCE
  assert cost.forward_flops(ledger, {}) == 1.5 * ONCE


def test_a_function_that_jax_has_cached_is_charged_again():
  @jax.jit
  def inner(x):
    return record.matmul(x @ x, ('inner',), 'linear', ONCE)

  ledgers = [executed.trace(lambda x: inner(inner(x)), SQUARE).ledger for _ in range(2)]
  assert ledgers[0] == ledgers[1] == {'inner/linear': cost.Matmul('linear', 2 * ONCE)}


def test_differences_are_listed_by_reason_including_none():
  def run(x):
    with record.gated(('gate',), cost.Gating(planned=0.25)):
      y = record.matmul(x @ x, ('a',), 'linear', ONCE, kernel='kernel')
    y = record.matmul(y @ x, ('scores',), 'scores', ONCE, causal=0.625)
    y = record.uncharged(y @ x, 'a reason', ONCE)
    return y @ x

  traced = executed.trace(run, SQUARE)
  found = executed.differences(traced.ledger, traced)
  want = {executed.GATES: 0.75, executed.PAIRS: 0.375, 'a reason': 1.0, executed.NO_REASON: 1.0}
  assert found == {reason: products * ONCE for reason, products in want.items()}
  charged = cost.forward_flops(cost.causal_pairs(traced.ledger), {})
  assert charged + sum(found.values()) == traced.flops == 4 * ONCE
  # A kernel that is charged otherwise than it runs has no reason either; keys have one.
  more = {path: dataclasses.replace(m, flops=2 * m.flops) for path, m in traced.ledger.items()}
  found = executed.differences(more, traced)
  assert found['no reason: a/linear'] == -ONCE
  assert found[executed.KEYS] == (-1 + 2 * 0.375) * ONCE and executed.PAIRS not in found
