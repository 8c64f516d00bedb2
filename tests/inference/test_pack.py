"""A packed model computes the same as its masked or gated twin, with fewer weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import tree
from sparse_lm.inference import formats, pack
from sparse_lm.inference.decode import Decoder
from sparse_lm.layers.sow import SOWN
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.patterns import pattern
from sparse_lm.runs.build import build
from sparse_lm.weights.method import apply_masks

VOCAB = 11
WIDE = {
  'model.width': 32,
  'model.hidden': 64,
  'model.heads': 4,
  'model.kv_heads': 4,
  'model.layers': 2,
}
# Pattern of the masks, overrides, and formats that some matrix is to run in.
CASES = {
  'dense': (None, {}, {'dense_out_in', 'dense_in_out'}),
  'weights': ('unstructured', {}, {'dense_out_in'}),
  '2:4': ('2:4', {}, {'dense_out_in'}),
  'tiles': ('block:16', {}, {'block'}),
  'rows': ('row', {}, {'channels'}),
  'columns': ('column', {}, {'channels'}),
  'neurons': ('neuron', {'model.bias': True}, {'dense_out_in'}),
  'gated neurons': ('neuron', {'mlp.name': 'gated', 'activation.name': 'silu'}, {'dense_out_in'}),
  'heads': ('head', {'model.bias': True}, {'dense_out_in'}),
  'heads that share keys': ('head', {'model.kv_heads': 2}, {'dense_out_in'}),
  'heads behind gates': ('head', {'attention.name': 'head_gate'}, {'dense_out_in'}),
  'layers': ('layer', {}, {'dense_out_in'}),
  'neurons of experts': (
    'neuron',
    {'mlp.name': 'moe_topk', 'model.bias': True},
    {'unstacked_experts'},
  ),
  'experts of top-k': (
    'neuron',
    {'mlp.name': 'moe_topk', 'activation.name': 'topk'},
    {'unstacked_experts'},
  ),
  'experts by choice': (None, {'mlp.name': 'expert_choice'}, {'unstacked_experts'}),
  'top-k': (None, {'activation.name': 'topk'}, {'gather'}),
  'top-k neurons': ('neuron', {'activation.name': 'topk', 'model.bias': True}, {'gather'}),
  'statistical top-k': (None, {'activation.name': 'statistical_topk'}, {'gather'}),
  'gated top-k': (None, {'mlp.name': 'gated', 'activation.name': 'topk'}, {'gather'}),
  'predictor and tiles': (
    'block:16',
    {'mlp.name': 'predictor_topk', 'mlp.density': 0.6},
    {'block'},
  ),
  'top-k and tiles': ('block:16', {'activation.name': 'topk'}, {'block'}),
  'predictor': (None, {'mlp.name': 'predictor_topk', 'model.bias': True}, {'gather'}),
  'exact predictor': (None, {'mlp.name': 'predictor_topk', 'mlp.selector': 'exact'}, {'gather'}),
  'layer gates': (None, {'depth.name': 'layer_gate'}, {'dense_out_in'}),
  'depth and tiles': ('block:16', {'depth.name': 'mixture_of_depths'}, {'block'}),
}


@pytest.fixture(scope='module')
def case(tiny_config, packed_by_bytes):
  """`case(name) -> (model, variables with zeros where masked, masks, packed)`."""

  @functools.cache
  def build(name):
    kind, fields, _ = CASES[name]
    model = lm.from_config(tiny_config(**WIDE | fields), vocab=VOCAB)
    draw = np.random.default_rng(0).normal
    shapes = plan_of(model).variables
    params = jax.tree.map(
      lambda a: draw(0.4 * (a.ndim == 1), 0.3, a.shape).astype('f'), shapes['params']
    )
    others = {n: shapes[n] for n in shapes if n not in ('params', *SOWN)}
    state = jax.tree.map(lambda a: np.full(a.shape, 1 / a.size, a.dtype), others)
    masks = masks_of(kind, model, params)
    params = apply_masks(params, masks)
    return model, {'params': params, **state}, masks, pack.pack(model, params, masks, state)

  return build


def masks_of(kind, model, params):
  """Half of the units of the layers' matrices, `None` elsewhere."""
  if kind is None:
    return jax.tree.map(lambda w: None, params)
  units = pattern(kind, plan_of(model).units)
  covered = tree.map_named(
    lambda path, w: (
      np.abs(w)
      if path.startswith('block_')
      and w.ndim >= 2
      and 'router' not in path
      and 'bias' not in path
      and units.covers(path, w.shape)
      else None
    ),
    params,
  )
  return units.masks(covered, jax.tree.map(lambda w: jnp.float32(0.5), covered))


@functools.cache
def evaluated(model, mode):
  return jax.jit(lambda variables, tokens: model.apply(variables, tokens, mode=mode))


RUNNING = {name for name in formats.names() if formats.load(name).runs}
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (2, 16)).astype(np.int32)


# What takes seconds to compile and is like a case that stays: `make test-slow` runs it.
SLOW = (
  'layer gates',
  'depth and tiles',
  'experts of top-k',
  'experts by choice',
  'top-k',
  'top-k and tiles',
  'top-k neurons',
  'statistical top-k',
  'columns',
  'neurons of experts',
  'heads that share keys',
  'gated top-k',
  'exact predictor',
  'predictor and tiles',
  'heads behind gates',
)


EACH = pytest.mark.parametrize(
  'name', [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)


@EACH
def test_it_equals_its_twin_in_one_pass_and_token_by_token(name, case):
  model, variables, _, packed = case(name)
  want = np.asarray(evaluated(model, 'eval')(variables, TOKENS))
  agree = functools.partial(assert_allclose, rtol=0, atol=1e-4 * np.abs(want).max())
  agree(evaluated(model, 'eval')(packed.variables, TOKENS), want)
  # One token of one sequence is where active units are gathered.
  decoder = Decoder(model, packed.variables)
  logits, cache, _ = decoder.begin([TOKENS[0, :4]])
  agree(logits[0], want[0, 3])
  for place in range(4, 10):
    logits, cache = decoder.decode(
      decoder.variables, cache, TOKENS[0, place : place + 1], np.array([place])
    )
    agree(logits[0], want[0, place])


def test_every_format_that_runs_is_expected_of_a_case():
  assert set().union(*(expected for _, _, expected in CASES.values())) == RUNNING


@EACH
def test_each_matrix_runs_in_the_format_made_for_it(name, case):
  _, _, masks, packed = case(name)
  found = {formats.name_of(matrix.runs) for matrix in packed.matrices.values()}
  expected = CASES[name][2]
  assert expected <= found <= expected | RUNNING - {'unstacked_experts'}
  for path, matrix in packed.matrices.items():
    # What runs dense although something was dropped says why.
    mask = tree.named(masks).get(path)
    whole = np.prod(matrix.runs.kernel().shape) * 4 == matrix.dense_bytes
    if mask is not None and not mask.all() and matrix.runs.plain and whole:
      assert 'block' in matrix.why and 'channels' in matrix.why
    assert matrix.stored.nbytes <= matrix.runs.nbytes <= matrix.dense_bytes * 1.1


def test_matrices_are_stored_in_the_smallest_format(case):
  stored = {
    name: {formats.name_of(m.stored) for p, m in case(name)[3].matrices.items() if 'block' in p}
    for name in ('weights', '2:4', 'tiles', 'dense')
  }
  assert stored['weights'] == {'bitmask'} and stored['2:4'] == {'n_of_m'}
  assert 'block' in stored['tiles'] and stored['dense'] == {'dense_out_in', 'dense_in_out'}


def test_outputs_are_selected_only_if_the_next_inputs_are(case):
  def chosen(name):
    mlp = 'block_0/mlp/{}/kernel'.format
    return [formats.name_of(case(name)[3].matrices[mlp(part)].runs) for part in ('up', 'down')]

  assert chosen('predictor') == ['dense_out_in', 'gather']
  # Where the down-projection runs its tiles all units are computed, and `dense` is not the fastest.
  assert chosen('predictor and tiles') == ['channels', 'block']
  # The gate of a gated MLP selects the units, so only the other side skips the rest.
  matrices = case('gated top-k')[3].matrices
  assert {'block_0/mlp/gate/kernel', 'block_0/mlp/up/kernel'} <= matrices.keys()


def sizes(packed, path):
  return packed.matrices[path].runs.kernel().shape


def test_units_are_removed_if_nothing_depends_on_their_number(case):
  assert sizes(case('neurons')[3], 'block_0/mlp/up/kernel') == (32, 32)
  assert sizes(case('neurons')[3], 'block_1/mlp/down/kernel') == (32, 32)
  assert sizes(case('gated neurons')[3], 'block_1/mlp/gate_up/kernel') == (32, 2 * 32)
  assert sizes(case('heads')[3], 'block_0/attention/query_key_value/kernel') == (32, 3 * 16)
  sharing = case('heads that share keys')[3]
  assert sizes(sharing, 'block_0/attention/query_key_value/kernel') == (32, 16 + 8 + 8)
  assert sizes(sharing, 'block_0/attention/out/kernel') == (16, 32)
  # Gates decide about every head, and top-k ranks every neuron.
  assert sizes(case('top-k neurons')[3], 'block_0/mlp/up/kernel') == (32, 64)
  assert not case('heads behind gates')[3].removed
  # Of each expert as many as of the one that keeps most.
  _, _, masks, packed = case('neurons of experts')
  kept = np.asarray(masks['block_0']['mlp']['experts']['down']).any(axis=-1).sum(axis=-1)
  experts, width, hidden = sizes(packed, 'block_0/mlp/experts/up')
  assert (experts, width, hidden) == ((kept > 0).sum(), 32, kept.max()) and hidden < 64


def test_kernels_with_the_same_inputs_are_fused_if_that_is_not_slower(case):
  for name in ('dense', 'tiles', 'weights'):
    _, variables, _, packed = case(name)
    held = variables['params']['block_0']['attention']
    parts = [held[part]['kernel'] for part in ('query', 'key', 'value')]
    one = packed.matrices['block_0/attention/query_key_value/kernel']
    assert_array_equal(one.runs.kernel(), np.concatenate(parts, axis=1))
    assert one.dense_bytes == sum(part.size * 4 for part in parts)
    assert 'block_0/attention/key/kernel' not in packed.matrices


@pytest.mark.parametrize('shared', [True, False])
def test_kernels_that_read_other_inputs_stay_apart(shared, case):
  model, variables, masks, _ = case('rows')
  masks = jax.tree.map(lambda w: None, masks, is_leaf=lambda w: w is None)
  for i, part in enumerate(('query', 'key', 'value')):
    mask = np.zeros((32, 32), bool)
    mask[:3] = True
    masks['block_1']['attention'][part]['kernel'] = mask if shared else np.roll(mask, 3 * i, axis=0)
  params = apply_masks(variables['params'], masks)
  packed = pack.pack(model, params, masks, {})
  assert ('block_1/attention/key/kernel' in packed.matrices) == (not shared)
  want = evaluated(model, 'eval')({'params': params}, TOKENS)
  assert_allclose(evaluated(model, 'eval')(packed.variables, TOKENS), want, rtol=1e-4, atol=1e-4)


def test_a_layer_without_output_weights_is_removed(case):
  _, _, masks, packed = case('layers')
  gone = [i for i in (0, 1) if not np.asarray(masks[f'block_{i}']['mlp']['up']['kernel']).any()]
  assert len(gone) == 1 and packed.removed == [f'layers {gone[0]}: removed']
  assert not [p for p in packed.matrices if p.startswith(f'block_{gone[0]}/')]
  cache = Decoder(packed.model, packed.variables).cache(1)
  assert set(cache) == {f'block_{1 - gone[0]}'}


@pytest.mark.parametrize('logit', [-0.1, 0.1])
def test_a_layer_gate_that_is_closed_removes_its_layer(logit, case):
  model, variables, masks, _ = case('layer gates')
  params = jax.tree.map(np.copy, variables['params'])
  params['depth_1']['logit'] = np.float32(logit)
  params['depth_0']['logit'] = np.float32(0.2)
  packed = pack.pack(model, params, masks, {})
  assert packed.removed == ([] if logit > 0 else ['layers 1: removed'])
  want = evaluated(model, 'eval')({'params': params}, TOKENS)
  assert_allclose(evaluated(model, 'eval')(packed.variables, TOKENS), want, rtol=1e-4, atol=1e-4)


def test_an_expert_without_weights_is_removed(case):
  for name in ('neurons of experts', 'experts by choice'):
    model, variables, _, _ = case(name)
    params = jax.tree.map(np.copy, variables['params'])
    experts = params['block_0']['mlp']['experts']
    masks = jax.tree.map(lambda w: None, params)
    mask = np.ones(experts['down'].shape, bool)
    mask[2] = False
    masks['block_0']['mlp']['experts']['down'] = mask
    experts['down'] = experts['down'] * mask
    if 'down_bias' in experts:
      experts['down_bias'][2] = 0
    packed = pack.pack(model, params, masks, {k: v for k, v in variables.items() if k != 'params'})
    assert packed.removed == ['block_0/mlp/experts: 7 of 8 experts kept']
    want = np.asarray(evaluated(model, 'eval')(variables | {'params': params}, TOKENS))
    agree = functools.partial(assert_allclose, rtol=1e-4, atol=1e-4)
    agree(evaluated(model, 'eval')(packed.variables, TOKENS), want)
    decoder = Decoder(model, packed.variables)
    logits, cache, _ = decoder.begin([TOKENS[0, :4]])
    agree(logits[0], want[0, 3])
    logits, _ = decoder.decode(decoder.variables, cache, TOKENS[0, 4:5], np.array([4]))
    agree(logits[0], want[0, 4])


def test_the_dense_twin_is_the_model_without_sparsity(case):
  model, *_ = case('depth and tiles')
  twin = pack.dense_twin(model)
  layouts = {path: formats.name_of(m.runs) for path, m in twin.matrices.items()}
  assert set(layouts.values()) == {'dense_out_in', 'dense_in_out'}
  # 32 inputs and 64 units.
  assert layouts['block_0/mlp/up/kernel'] == 'dense_in_out'
  assert layouts['block_0/mlp/down/kernel'] == 'dense_out_in'
  assert twin.model == lm.dense_twin(model) and not twin.removed
  dense_bytes = sum(
    np.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(plan_of(lm.dense_twin(model)).params)
  )
  assert pack.total_bytes(twin.variables) == dense_bytes


def test_kernels_are_stored_in_the_dtype_that_the_model_computes_in(tiny_config):
  chosen = {'model.precision': 'bfloat16', 'model.bias': True, 'weight.name': 'static'}
  program, target = build(tiny_config(**chosen), vocab=11)
  packed = pack.pack(program.model, *program.finalize(program.init(0, target)), {})
  leaves = jax.tree.leaves(packed.variables['packed'])
  assert {leaf.dtype.name for leaf in leaves if leaf.dtype != jnp.int32} == {'bfloat16'}
  kept = {leaf.dtype.name for leaf in jax.tree.leaves(packed.variables['params'])}
  assert kept == {'float32'}
  assert all(matrix.runs.nbytes <= matrix.dense_bytes for matrix in packed.matrices.values())
