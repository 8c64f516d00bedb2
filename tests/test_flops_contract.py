"""The plan of every method equals a count over its program, in every mode, but for named reasons."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose
from test_contract import LAYERS, WEIGHTS, config_of, over_weights, sparsity_for

from sparse_lm.inference.pack import pack
from sparse_lm.model import lm, plans, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost, executed
from sparse_lm.runs.build import build

TOKEN = jax.ShapeDtypeStruct((1, 1), jnp.int32)
CONTEXT = 64  # longer than a window, and more than the keys that a query may choose


def by_reason(model, traced, mode):
  """FLOPs per token that are executed less those that are charged; every one has a reason."""
  # A training step is charged for what gates close.
  trains = mode == 'train'
  charged = (
    cost.ungated(plans.ledger(model, CONTEXT, mode)) if trains else plans.ledger(model, CONTEXT)
  )
  found = executed.differences(charged, traced)
  print(f'executed {traced.flops:.0f}, by reason beyond what is charged: {found}')
  assert not [reason for reason in found if reason.startswith(executed.NO_REASON)], found
  read = cost.forward_flops(cost.causal_pairs(charged), {})
  assert_allclose(traced.flops, read + sum(found.values()))
  if mode != 'decode':  # the charge by all pairs is what is computed before the mask
    whole = cost.forward_flops(charged, {})
    assert_allclose(whole, read + found[executed.PAIRS])
  return found


@pytest.mark.parametrize('mode', ['train', 'eval', 'decode'])
@LAYERS
def test_flops_that_are_executed_are_charged_or_have_a_reason(slot, name, mode, tiny_config):
  chosen = {f'{slot}.name': name, 'model.bias': True, 'data.context': CONTEXT}
  model = lm.from_config(tiny_config(**chosen), vocab=11)
  traced = plans.traced(model, CONTEXT, mode)
  found = by_reason(model, traced, mode)
  # The plan's ledger is of another trace, that of the initialisation.
  assert mode != 'eval' or plan_of(model).ledger == traced.ledger
  # A method that says it saves nothing executes what it charges, but for keys that it does not read.
  if not slots.MethodConfig(slot, name).traits(model.spec).twin:
    assert set(found) == {executed.KEYS if mode == 'decode' else executed.PAIRS}


@pytest.mark.parametrize('mode', ['train', 'eval', 'decode'])
def test_flops_of_methods_inside_each_other_have_a_reason_too(mode, tiny_config):
  gates = {'depth.name': 'token_gate', 'attention.name': 'head_gate', 'activation.name': 'topk'}
  inner = {'attention.inner.name': 'topk_keys', 'mlp.name': 'moe_topk', 'model.tied': True}
  more = {'model.layers': 2, 'depth.layers': '1:', 'model.kv_heads': 1, 'data.context': CONTEXT}
  model = lm.from_config(tiny_config(**gates, **inner, **more), vocab=11)
  assert by_reason(model, plans.traced(model, CONTEXT, mode), mode)


@pytest.mark.parametrize('mode', ['train', 'eval', 'decode'])
@over_weights(WEIGHTS)
def test_the_weights_that_a_model_sees_cost_no_matmul(name, mode, tiny_config):
  sparsity = 0.75 if sparsity_for(name) else 0.0  # rows of 16 weights have no fifth
  chosen = config_of(name, sparsity) | {'data.context': CONTEXT}
  program, target = build(tiny_config(**chosen), vocab=11)
  state = jax.eval_shape(lambda: program.init(0, target))

  def run(state, tokens):
    key = jax.random.key(0)
    params, _ = program.method.effective(state.trainable, state.sparse, mode, state.step, key)
    return program.model.apply({'params': params}, tokens, mode=mode)

  def decode(state, cache, token):
    params, _ = program.method.finalize(state.trainable, state.sparse, state.step)
    return decoded(program.model, {'params': params, 'cache': cache}, token)

  if mode == 'decode':
    cache = lm.cache_shapes(program.model, {'params': state.trainable['params']}, 1)
    traced = executed.trace(decode, state, cache, TOKEN)
  else:
    tokens = jax.ShapeDtypeStruct((1, CONTEXT), jnp.int32)
    traced = executed.trace(run, state, tokens).per_token(CONTEXT)
  # A cache has room for more keys than there are.
  expected = executed.KEYS if mode == 'decode' else executed.PAIRS
  assert set(by_reason(program.model, traced, mode)) == {expected}


def decoded(model, variables, token):
  """Logits of one more token, and the cache with it."""
  return model.apply(variables, token, mode='decode', mutable=['cache'])


@pytest.mark.parametrize('pattern', ['unstructured', 'block:16', 'column'])
def test_a_packed_model_decodes_with_the_weights_that_its_formats_store(
  pattern, tiny_config, packed_by_bytes
):
  fields = {'model.width': 64, 'model.hidden': 128, 'data.context': CONTEXT}
  fields |= {'weight.name': 'static', 'weight.pattern': pattern, 'weight.sparsity': 0.5}
  program, target = build(tiny_config(**fields), vocab=11)
  model, state = program.model, program.init(0, target)
  packed = pack(model, *program.finalize(state), {})
  cache = lm.cache_shapes(model, packed.variables, 1)
  run = functools.partial(decoded, model)
  traced = executed.trace(run, {**packed.variables, 'cache': cache}, TOKEN)
  stored = sum(
    leaf.size
    for matrix in packed.matrices.values()
    for leaf in jax.tree.leaves(matrix.runs)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  )
  plan = plan_of(model)
  packable = sum(math.prod(plan.shapes[path].shape) for path in plan.packable)
  assert (stored < packable) == (pattern != 'unstructured')
  assert not any('head' in line for line in packed.removed)  # attention costs what it did
  dense = plans.traced(model, CONTEXT, 'decode').flops
  assert_allclose(dense - traced.flops, 2.0 * (packable - stored))
