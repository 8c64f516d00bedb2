"""The planned bytes that decoding reads from caches, against a count over the traced program."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Var

from sparse_lm.model import lm, plans
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost

CONTEXT, SLOTS, HEAD = 64, 80, 8
# What shows all of an array in another shape, or an array with a few entries written anew.
VIEWS = (
  'broadcast_in_dim',
  'copy',
  'name',
  'reshape',
  'select_n',
  'slice',
  'squeeze',
  'stop_gradient',
  'transpose',
)
WRITES = ('dynamic_update_slice', 'scatter')
TAKES = ('gather', 'dynamic_slice')


def size(var):
  return math.prod(var.aval.shape) * var.aval.dtype.itemsize


def count(jaxpr, kept):
  """Bytes that products, gathers and slices read of the arrays `kept`, and which outputs show those.

  Of a conditional, the branch that reads least: a mean is taken once a block.
  """
  kept, total = set(kept), 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    here = [isinstance(v, Var) and v in kept for v in equation.invars]
    if not any(here):
      continue
    inside = list(functions(equation.params))
    if name == 'cond':
      found = [count(j, [v for v, h in zip(j.invars, here[1:]) if h]) for j in inside]
      total += min(n for n, _ in found)
      shown = [any(flags) for flags in zip(*(flags for _, flags in found))]
      kept |= {v for v, flag in zip(equation.outvars, shown) if flag}
    elif inside:
      (own,) = inside
      read, shown = count(own, [v for v, h in zip(own.invars, here) if h])
      total += read * equation.params.get('length', 1)
      kept |= {v for v, flag in zip(equation.outvars, shown) if flag}
    elif name == 'dot_general':
      total += sum(size(v) for v, h in zip(equation.invars, here) if h)
    elif name in TAKES:
      total += size(equation.outvars[0])
    elif name in VIEWS or (name in WRITES and here[0]):
      kept.add(equation.outvars[0])
    else:
      raise AssertionError(f'{name} reads a cache in a way that is not counted')
  return total, [isinstance(v, Var) and v in kept for v in jaxpr.outvars]


def functions(params):
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, ClosedJaxpr):
        yield item.jaxpr


def in_program(model):
  """Bytes of keys, values and means that a token's program reads, by its equations."""
  cache = lm.cache_shapes(model, plan_of(model).variables, 1)
  variables = {**plan_of(model).variables, 'cache': cache}
  run = lambda v, t: model.apply(v, t, mode='decode', mutable=['cache'])[0]  # noqa: E731
  jaxpr = jax.make_jaxpr(run)(variables, jax.ShapeDtypeStruct((1, 1), jnp.int32)).jaxpr
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  names = ("'keys'", "'values'", "'keys_means'")
  kept = [v for v, path in zip(jaxpr.invars, paths) if any(name in path for name in names)]
  assert len(kept) >= 2 * model.spec.layers
  return count(jaxpr, kept)[0]


ROW = 4 * HEAD  # bytes of a key or a value of one head


@pytest.mark.parametrize(
  ('fields', 'rows'),
  [
    ({}, 2 * 4 * SLOTS),
    ({'model.kv_heads': 1}, 2 * SLOTS),
    ({'attention.name': 'sliding_window', 'attention.window': 20}, 2 * 4 * 32),
    # All keys of the key heads, and each query head's values.
    ({'attention.name': 'topk_keys', 'attention.k': 5, 'model.kv_heads': 2}, 2 * SLOTS + 4 * 5),
    # Of each query head three blocks of keys and values; of the key heads' blocks the means.
    (
      {'attention.name': 'moba', 'attention.block': 8, 'attention.k': 3, 'model.kv_heads': 2},
      2 * 4 * 24 + 2 * 8,
    ),
    ({'attention.name': 'head_gate', 'attention.inner.name': 'moba'}, 2 * 4 * 12 + 4 * 16),
  ],
)
def test_bytes_that_are_planned_to_be_read_are_those_of_the_program(fields, rows, tiny_config):
  sizes = {'model.heads': 4, 'model.kv_heads': 4, 'model.width': 4 * HEAD, 'data.context': CONTEXT}
  model = lm.from_config(tiny_config(**sizes | fields), vocab=11)
  planned = cost.read_bytes(plans.traced(model, CONTEXT, 'decode').reads)
  assert planned == in_program(model) == rows * ROW


def test_layers_that_tokens_skip_are_read_as_often_as_they_enter(tiny_config):
  config = tiny_config(depth__name='mixture_of_depths', model__layers=2)
  reads = plans.traced(lm.from_config(config, vocab=11), 16, 'decode').reads
  every = sum(read.nbytes for read in reads.values())
  assert cost.read_bytes(reads, {'depth_0': 0.5, 'depth_1': 0.0}) == every / 4
