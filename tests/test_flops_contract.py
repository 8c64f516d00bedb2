"""The plan of every method equals a count over its program, in every mode, but for named reasons."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose
from test_contract import LAYERS, WEIGHTS, config_of, over_weights, sparsity_for

from sparse_lm.model import lm, plans, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost, executed
from sparse_lm.runs.build import build

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


@pytest.mark.parametrize('mode', ['train', 'eval'])
@over_weights(WEIGHTS)
def test_the_weights_that_a_model_sees_cost_no_matmul(name, mode, tiny_config):
  sparsity = 0.75 if sparsity_for(name) else 0.0  # rows of 16 weights have no fifth
  program, target = build(tiny_config(**config_of(name, sparsity)), vocab=11)
  state = jax.eval_shape(lambda: program.init(0, target))

  def run(state, tokens):
    key = jax.random.key(0)
    params, _ = program.method.effective(state.trainable, state.sparse, mode, state.step, key)
    return program.model.apply({'params': params}, tokens, mode=mode)

  tokens = jax.ShapeDtypeStruct((1, CONTEXT), jnp.int32)
  traced = executed.trace(run, state, tokens).per_token(CONTEXT)
  assert set(by_reason(program.model, traced, mode)) == {executed.PAIRS}
