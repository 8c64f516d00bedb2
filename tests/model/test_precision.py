"""bfloat16 computation around float32 weights, and the fused attention of a whole training step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.model import lm, plans
from sparse_lm.plan.executed import _functions
from sparse_lm.runs import arithmetic
from sparse_lm.runs.build import build

SIZES = {'model.layers': 2, 'data.context': 20, 'model.precision': 'bfloat16', 'optimizer.ema': 0.9}
FORWARD, BACKWARD = '@__cudnn$fmhaSoftmax(', '@__cudnn$fmhaSoftmaxBackward('


def step_of(tiny_config, **fields):
  """A fresh program, which has compiled nothing, its state as shape structs, and a batch of tokens."""
  program, target = build(tiny_config(**SIZES | fields), vocab=11)
  state = jax.eval_shape(program.init, 0, target)
  tokens = jax.ShapeDtypeStruct((4, program.model.spec.context + 1), jnp.int32)
  return program, state, tokens


def floats(tree):
  leaves = jax.tree.leaves(tree)
  return {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}


@pytest.mark.parametrize('fields', [
  {},
  {'weight.name': 'rigl', 'weight.sparsity': 0.5, 'model.bias': True, 'model.norm': 'layernorm'},
  {'mlp.name': 'moe_topk', 'train.accumulation': 2, 'model.positions': 'learned'},
])  # fmt: skip
def test_weights_moments_averages_and_metrics_are_float32(fields, tiny_config):
  program, state, tokens = step_of(tiny_config, **fields)
  assert program.model.spec.compute == jnp.bfloat16
  step = program.transition
  after, metrics = jax.eval_shape(step, state, tokens)
  for found in (state.trainable, state.opt_state, state.ema, after, metrics):
    assert floats(found.replace(key=None) if found is after else found) == {jnp.dtype('float32')}


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in _functions(equation.params):
      yield from equations(inner)


def test_products_with_weights_are_in_bfloat16_and_reductions_in_float32(tiny_config):
  program, state, tokens = step_of(tiny_config)
  traced = jax.make_jaxpr(program.transition)(state, tokens)
  kinds = {}
  for equation in equations(traced.jaxpr):
    dtypes = {v.aval.dtype for v in equation.invars if v.aval.ndim > 1}
    kinds.setdefault(equation.primitive.name, set()).update(dtypes)
  # Two matrices are multiplied in bfloat16 everywhere, forward and backward.
  assert kinds['dot_general'] == {jnp.dtype('bfloat16')}
  # Norms, softmax and losses.
  for name in ('exp', 'log', 'rsqrt', 'cos', 'reduce_max'):
    assert kinds.get(name, set()) <= {jnp.dtype('float32')}, name


@pytest.mark.parametrize('kernel, remat', [('auto', 'none'), ('cudnn', 'full'), ('einsum', 'full')])
def test_the_step_of_a_gpu_has_fused_attention_forward_and_backward(
  kernel, remat, tiny_config, on_nvidia
):
  on_nvidia(9, 0)
  fields = {'model.attention_kernel': kernel, 'model.kv_heads': 1, 'model.remat': remat}
  program, state, tokens = step_of(tiny_config, **fields)
  step = jax.jit(program.transition)
  text = step.trace(state, tokens).lower(lowering_platforms=('cuda',)).as_text()
  layers = 0 if kernel == 'einsum' else 2
  assert text.count(BACKWARD) == layers
  assert text.count(FORWARD) == layers * (
    1 + (remat == 'full')
  )  # which runs the forward pass again
  # No array has a score for each pair of tokens.
  pairs = f'{program.model.spec.context}x{program.model.spec.context}xbf16'
  assert (pairs in text) == (kernel == 'einsum')
  assert arithmetic.attention_kernels(program.model) == (
    ('einsum' if kernel == 'einsum' else 'cudnn',),
    (),
  )


def test_costs_are_those_of_einsums_whatever_runs(tiny_config, on_nvidia):
  fields = {'model__attention_kernel': 'einsum', 'model__precision': 'bfloat16'}
  sizes = {'data__context': 12, 'model__remat': 'full'}
  want = lm.from_config(tiny_config(**fields | sizes), 11)
  on_nvidia(9, 0)
  found = lm.from_config(tiny_config(**fields | sizes | {'model__attention_kernel': 'cudnn'}), 11)
  assert plans.ledger(found, 12, 'train') == plans.ledger(want, 12, 'train')
  assert plans.traced(found, 12, 'train').flops == plans.traced(want, 12, 'train').flops
  assert plans.recomputed(found, 12) == plans.recomputed(want, 12) > 0


@pytest.mark.slow
def test_the_gradient_in_bfloat16_is_that_of_float32_but_for_rounding(tiny_config):
  found = {}
  for precision in ('float32', 'bfloat16'):
    program, target = build(tiny_config(**SIZES | {'model.precision': precision}), vocab=11)
    state = program.init(0, target)
    # The head starts at zero, and nothing below it would have a gradient.
    params = jax.tree.map(
      lambda a: a + 0.1 * np.random.default_rng(0).normal(size=a.shape).astype('f'),
      state.trainable['params'],
    )
    tokens = np.random.default_rng(1).integers(0, 11, (4, program.model.spec.context)).astype('i')

    def loss(params, model=program.model, tokens=tokens):
      return jnp.mean(jnp.square(model.apply({'params': params}, tokens, 'train')))

    found[precision] = jax.device_get(jax.jit(jax.grad(loss))(params))

  def near(half, exact):
    assert half.dtype == np.float32
    cosine = np.vdot(half, exact) / math.sqrt(np.vdot(half, half) * np.vdot(exact, exact))
    assert cosine > 0.999

  jax.tree.map(near, found['bfloat16'], found['float32'])


def test_rotary_tables_of_whole_sequences_are_those_of_one(tiny_config):
  program, state, tokens = step_of(tiny_config)
  traced = jax.make_jaxpr(program.transition)(state, tokens)
  shapes = {e.outvars[0].aval.shape for e in equations(traced.jaxpr) if e.primitive.name == 'cos'}
  spec = program.model.spec
  assert shapes - {()} == {(1, spec.context, 1, spec.head_dim // 2)}  # and the learning rate


def test_scanned_layers_share_one_fused_attention(tiny_config, on_nvidia):
  on_nvidia(9, 0)
  program, state, tokens = step_of(
    tiny_config, **{'model.layers': 3, 'model.scan_layers': 'always'}
  )
  step = jax.jit(program.transition)
  text = step.trace(state, tokens).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count(FORWARD) == text.count(BACKWARD) == 1
  assert arithmetic.attention_kernels(program.model) == (('cudnn',), ())


def test_the_first_state_needs_no_attention(tiny_config, on_nvidia):
  """A host that has no such kernel makes it for a GPU."""
  on_nvidia(9, 0)
  program, target = build(tiny_config(**SIZES), vocab=11)
  assert 'dot_general' not in program.init.compiled.lower(0, target).as_text()
