import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sparse_lm.model import lm, plans, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost, executed
from sparse_lm.plan.cost import Matmul
from sparse_lm.runs import configs
from sparse_lm.runs import cost_report as train_cost
from sparse_lm.runs.build import build

LAYERS, WIDTH, HIDDEN, HEADS, GROUPS, LENGTH, VOCAB = 2, 24, 40, 4, 2, 16, 19


def small(**changes):
  config = base.get_config()
  config.data.update({'context': LENGTH, 'batch': 2})
  config.model.update(
    {'layers': LAYERS, 'width': WIDTH, 'hidden': HIDDEN, 'heads': HEADS, 'kv_heads': GROUPS}
  )
  for field, value in changes.items():
    group, key = field.split('__')
    if group == 'weight' and key == 'name':
      with config.weight.unlocked():
        config.weight.update(slots.defaults('weight', value))
    with config.unlocked():
      config[group][key] = value
  return config


def by_hand(gated):
  """Multiplications and additions per token of each matmul, from the architecture alone."""
  head = WIDTH // HEADS
  block = {
    'attention/query/linear': 2 * WIDTH * WIDTH,
    'attention/key/linear': 2 * WIDTH * GROUPS * head,
    'attention/value/linear': 2 * WIDTH * GROUPS * head,
    'attention/attention/scores': 2 * LENGTH * HEADS * head,
    'attention/attention/values': 2 * LENGTH * HEADS * head,
    'attention/out/linear': 2 * WIDTH * WIDTH,
    'mlp/up/linear': 2 * WIDTH * HIDDEN,
    'mlp/down/linear': 2 * HIDDEN * WIDTH,
  }
  if gated:
    block['mlp/gate/linear'] = 2 * WIDTH * HIDDEN
  whole = {f'block_{i}/{name}': flops for i in range(LAYERS) for name, flops in block.items()}
  return whole | {'embed/tokens/lookup': 0, 'embed/head/linear': 2 * WIDTH * VOCAB}


@pytest.mark.parametrize('changes', [
  {},
  {'mlp__name': 'gated'},
  {'model__remat': 'full'},
  {'model__bias': True, 'model__norm': 'layernorm', 'model__positions': 'learned'},
])  # fmt: skip
def test_ledger_of_a_small_model_equals_a_hand_count(changes):
  model = lm.from_config(small(**changes), VOCAB)
  ledger = plans.ledger(model, LENGTH)
  want = by_hand('mlp__name' in changes)
  if 'model__positions' in changes:
    want['embed/positions/lookup'] = 0
  assert {path: m.flops for path, m in ledger.items()} == want


def test_a_tied_head_multiplies_with_the_embedding():
  ledger = plans.ledger(lm.from_config(small(model__tied=True), VOCAB), LENGTH)
  heads = [m for path, m in ledger.items() if not path.startswith('block_')]
  lookup = Matmul('lookup', 0, 'embed/tokens')
  assert heads == [lookup, Matmul('linear', 2 * WIDTH * VOCAB, 'embed/tokens')]


def test_kernels_are_named_as_the_parameters():
  model = lm.from_config(small(mlp__name='gated'), VOCAB)
  params = plan_of(model).params
  for path, matmul in plans.ledger(model, LENGTH).items():
    if matmul.kernel is None:
      assert path.endswith(('scores', 'values'))
      continue
    leaf = functools.reduce(lambda node, key: node[key], matmul.kernel.split('/'), params)
    assert matmul.flops == (0 if matmul.kind == 'lookup' else 2 * leaf.size)


def test_attention_grows_with_the_length_and_the_rest_does_not():
  model = lm.from_config(small(), VOCAB)
  short, long = plans.ledger(model, LENGTH // 2), plans.ledger(model, LENGTH)
  for path, matmul in long.items():
    factor = 2 if matmul.kernel is None else 1  # a lookup's zero has any
    assert matmul.flops == factor * short[path].flops


def test_what_runs_twice_is_charged_twice():
  model = lm.from_config(small(), VOCAB)
  tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
  twice = lambda v, t: (model.apply(v, t), model.apply(v, t, mode='train'))  # noqa: E731
  found = executed.trace(twice, plan_of(model).variables, tokens).per_token(LENGTH).ledger
  assert {path: m.flops for path, m in found.items()} == {
    path: 2 * flops for path, flops in by_hand(False).items()
  }


def test_ledger_agrees_with_xlas_own_count():
  config = base.get_config()
  config.data.context = 128
  config.model.update({'layers': 2, 'width': 512, 'hidden': 2048, 'heads': 8, 'kv_heads': 8})
  model = lm.from_config(config, 256)
  tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
  compiled = jax.jit(model.apply).lower(plan_of(model).variables, tokens).compile()
  ours = 128 * cost.forward_flops(plans.ledger(model, 128), {})
  # XLA counts elementwise operations too, so it can only be the larger one.
  assert 1.0 <= compiled.cost_analysis()['flops'] / ours < 1.03


LEDGER = {
  'up/linear': Matmul('linear', 100.0, 'up/kernel'),
  'down/linear': Matmul('linear', 50.0, 'down/kernel'),
  'scores': Matmul('scores', 30.0),
}


def test_forward_flops_scale_with_the_density_of_each_kernel():
  assert cost.forward_flops(LEDGER, {}) == 180
  assert cost.forward_flops(LEDGER, {'up/kernel': 0.1, 'down/kernel': 0.5}) == 10 + 25 + 30


@pytest.mark.parametrize('period', [1, 5, 20])
def test_training_flops_of_a_periodic_dense_gradient_are_rigls_closed_form(period):
  dense, sparse = 180, 0.1 * 100 + 0.2 * 50 + 30
  steps = [
    cost.training_flops(sparse, dense if step % period == 0 else None) for step in range(100)
  ]
  want = (3 * sparse * (period - 1) + 2 * sparse + dense) / period
  assert np.mean(steps) == pytest.approx(want)


def test_a_second_forward_pass_costs_a_third_more():
  assert cost.training_flops(180.0, passes=2) == 4 * 180


@pytest.fixture
def ramp():
  """Density that each of 100 steps runs at, for updates every 7 steps from 25 to 75."""
  held, densities = 1.0, []
  for step in range(100):
    densities.append(held)  # a step computes with what the steps before it left
    if 25 <= step <= 75 and ((step - 25) % 7 == 0 or step == 75):
      held = 1 - 0.9 * (1 - (1 - (step - 25) / 50) ** 3)
  return densities


def forward_by_hand(density):
  """FLOPs with every kernel of a block at one density and the head dense."""
  return sum(
    flops * (1 if 'attention/attention' in path or 'head' in path else density)
    for path, flops in by_hand(False).items()
  )


STE = {
  'weight__name': 'magnitude',
  'weight__apply': 'straight_through',
  'weight__schedule': 'at_once',
  'weight__start': 0.0,
}


@pytest.mark.parametrize('name', ['static', 'magnitude', 'rigl', 'ste', 'none'])
def test_report_of_a_run_equals_a_hand_count(name, ramp):
  sparsity = 0.0 if name == 'none' else 0.9
  fields = STE if name == 'ste' else {'weight__name': name}
  config = small(**fields, weight__sparsity=sparsity, train__steps=100)
  if name in ('magnitude', 'rigl'):
    config.weight.period = 7
  program, target = build(config, VOCAB)
  report = train_cost.report(program, target)

  block = [(24, 24), (24, 12), (24, 12), (24, 24), (24, 40), (40, 24)]
  prunable = LAYERS * sum(a * b for a, b in block)
  params = prunable + 2 * VOCAB * WIDTH + (2 * LAYERS + 1) * WIDTH
  left = LAYERS * sum(round(a * b * (1 - sparsity)) for a, b in block)
  masked = name != 'none'
  assert report['params'] == params and report['dense_bytes'] == 4 * params
  assert report['prunable_params'] == (prunable if masked else 0)
  assert report['nonzero_params'] == params - prunable + left
  assert report['sparsity_total'] == pytest.approx((prunable - left) / params)
  if masked:
    assert report['sparsity_prunable'] == pytest.approx(1 - left / prunable)
  mask_bytes = prunable // 8 if masked else 0  # every matrix has a multiple of 8 weights
  assert report['stored_bytes'] == 4 * report['nonzero_params'] + mask_bytes

  dense, final = forward_by_hand(1), forward_by_hand(1 - sparsity)
  # Whole counts of small matrices are not exactly a tenth.
  assert report['flops_forward'] == pytest.approx(final, rel=2e-3)
  assert report['flops_forward_ratio'] == pytest.approx(report['flops_forward'] / dense)
  updates = len([step for step in range(1, 75) if step % 7 == 0])
  training = {
    'static': 3 * final,
    'none': 3 * dense,
    'ste': 2 * final + dense,
    'rigl': (3 * final * (100 - updates) + (2 * final + dense) * updates) / 100,
    'magnitude': np.mean([3 * forward_by_hand(d) for d in ramp]),
  }[name]
  assert report['flops_training'] == pytest.approx(training, rel=2e-3)
  assert report['flops_training_ratio'] == pytest.approx(report['flops_training'] / (3 * dense))


def test_attention_is_reported_over_all_pairs_and_over_causal_ones():
  window, context, width, hidden, vocab = 8, 64, 64, 256, 256
  config = base.get_config()
  config.data.context = context
  config.model.update({'layers': 2, 'width': width, 'hidden': hidden})
  with config.unlocked():
    config.attention.update({'name': 'sliding_window', 'window': window})
  report = train_cost.report(*build(config, vocab))
  reads = causal = 0
  for query in range(context):
    for key in range(query + 1):
      causal, reads = causal + 1, reads + (query - key < window)
  linear = 2 * (4 * width**2 + 2 * width * hidden) * 2 + 2 * width * vocab
  dense, exact, windowed = (
    linear + 2 * 2 * 2 * width * pairs / context for pairs in (context**2, causal, reads)
  )
  all_pairs = linear + 2 * 2 * 2 * width * context * reads / causal
  assert report['flops_forward'] == pytest.approx(all_pairs)
  assert report['flops_forward_ratio'] == pytest.approx(all_pairs / dense)
  assert report['flops_forward_causal'] == pytest.approx(windowed)
  assert report['flops_forward_causal_ratio'] == pytest.approx(windowed / exact)
  assert f'{all_pairs / dense:.3f} {windowed / exact:.3f}' == '0.904 0.948'


def test_sizes_count_mask_bits_in_whole_bytes():
  shape = jax.ShapeDtypeStruct
  params = {
    'a': shape((3, 5), jnp.float32),
    'b': shape((4, 4), jnp.bfloat16),
    'c': shape((10,), jnp.float32),
    'd': shape((2, 2), jnp.float32),
  }
  sizes = cost.sizes(params, {'a': 6, 'b': 3, 'd': 4})
  assert (sizes.params, sizes.prunable, sizes.nonzero) == (45, 35, 23)
  # a: 6 floats and 15 bits in 2 bytes; b: 3 halves and 2 bytes; c dense; d full, so no mask.
  assert sizes.stored_bytes == (24 + 2) + (6 + 2) + 40 + 16
  assert sizes.sparsity_prunable == pytest.approx(22 / 35)
  assert sizes.sparsity_total == pytest.approx(22 / 45)


def test_given_masks_are_counted_rather_than_targets():
  program, target = build(small(weight__name='static', weight__sparsity=0.5), VOCAB)
  masks = jax.tree.map(lambda leaf: None, plan_of(program.model).params)
  masks['block_0']['mlp']['up']['kernel'] = jnp.zeros((WIDTH, HIDDEN), bool).at[0, 0].set(True)
  report = train_cost.report(program, target, masks)
  assert report['params'] - report['nonzero_params'] == WIDTH * HIDDEN - 1
  up = 2 * WIDTH * HIDDEN
  assert report['flops_forward'] == pytest.approx(forward_by_hand(1) - up + 2)


def test_the_small_configs_here_are_what_loading_would_give(tmp_path):
  file = tmp_path / 'plain.py'
  file.write_text('from configs import base\n\nget_config = base.get_config\n')
  loaded = configs.load(str(file), {'weight.name': 'rigl'}).weight
  assert loaded.to_dict() == small(weight__name='rigl').weight.to_dict()
