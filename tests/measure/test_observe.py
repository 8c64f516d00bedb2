"""Statistics of gates and masks, and the costs that follow, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sparse_lm.core.estimator import ESTIMATORS
from sparse_lm.evals.loss import separated
from sparse_lm.measure import observe
from sparse_lm.model import lm, plans, slots
from sparse_lm.plan import cost
from sparse_lm.runs import cost_report as train_cost
from sparse_lm.runs.build import build
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.setup import setup

OBSERVED = {
  'gates/depth_0': 0.25,
  'gates/block_1/mlp': 0.5,
  'block_0/mlp/active': 0.125,
  'block_1/mlp/active': 0.375,
  'block_1/mlp/dead': 0.0625,
  'block_0/mlp/load/0': 0.75,
  'block_0/mlp/load/1': 0.25,
}


def test_activity_is_the_open_fraction_of_gates_by_path():
  assert observe.activity(OBSERVED) == {'depth_0': 0.25, 'block_1/mlp': 0.5}
  assert observe.activity({'block_0/gates/active': 0.5, 'a/gates/b': 1.0}) == {}


def test_a_summary_has_means_over_layers_without_gates():
  # A vector's items are no numbers of a layer, and gates have a table of their own.
  assert observe.summary(OBSERVED) == {'active': 0.25, 'dead': 0.0625}
  assert observe.summary({}) == {}


def test_connections_are_densities_and_shares_of_bits_that_flipped():
  before = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)
  after = np.array([[1, 0, 0, 1], [1, 1, 1, 1]], bool)
  same = np.array([True, False, True, True])
  masks = {'a': {'kernel': after}, 'b': same, 'dense': None}
  assert observe.connections(masks, {'a': {'kernel': before}, 'b': same, 'dense': None}) == {
    'density/a/kernel': 0.75,
    'flips/a/kernel': 0.625,
    'density/b': 0.75,
    'flips/b': 0.0,
  }
  assert observe.connections({'dense': None}, {'dense': None}) == {}


LAYERS, WIDTH, HIDDEN, HEADS, LENGTH, VOCAB, EXPERTS = 2, 16, 24, 4, 8, 19, 4


def small(depth='residual', attention='full', mlp='dense', **fields):
  """A config; `depth__open=0.3` is a field of its group."""
  config = base.get_config()
  config.data.update({'context': LENGTH, 'batch': 2})
  config.model.update(
    {'layers': LAYERS, 'width': WIDTH, 'hidden': HIDDEN, 'heads': HEADS, 'kv_heads': HEADS}
  )
  with config.unlocked():
    for slot, name in (('depth', depth), ('attention', attention), ('mlp', mlp)):
      config[slot].update({'name': name, **slots.defaults(slot, name)})
    for field, value in fields.items():
      group, key = field.split('__')
      config[group][key] = value
  return config


def ledger_of(*names, **fields):
  return plans.ledger(lm.from_config(small(*names, **fields), VOCAB), LENGTH)


# FLOPs per token, by hand.
PROJECTION, TO_KEYS, MLP = 2 * WIDTH * WIDTH, 2 * LENGTH * WIDTH, 4 * WIDTH * HIDDEN
INPUTS = 3 * PROJECTION  # queries, keys and values
HEADS_OWN = 2 * TO_KEYS + PROJECTION  # scores, values and the output's projection
BLOCK, HEAD = INPUTS + HEADS_OWN + MLP, 2 * WIDTH * VOCAB
ROUTER = 2 * WIDTH  # of one unit


def test_a_gated_layer_costs_as_much_as_its_gate_is_open():
  ledger = ledger_of('token_gate')
  active = {'depth_0': 0.25, 'depth_1': 0.75}
  routers = LAYERS * ROUTER  # which no gate skips
  want = HEAD + routers + (0.25 + 0.75) * BLOCK
  assert cost.forward_flops(ledger, {}, active) == pytest.approx(want)
  want = HEAD + routers + 0.25 * BLOCK + BLOCK  # what was not measured may run as a whole
  assert cost.forward_flops(ledger, {}, {'depth_0': 0.25}) == pytest.approx(want)
  assert cost.flops_range(ledger, {}) == pytest.approx((HEAD + routers, HEAD + routers + 2 * BLOCK))


def test_a_layers_gate_needs_no_router():
  want = HEAD + 0.5 * BLOCK
  ledger = ledger_of('layer_gate')
  assert cost.forward_flops(ledger, {}, {'depth_0': 0.5, 'depth_1': 0}) == pytest.approx(want)


@pytest.mark.parametrize(
  ('depth', 'fields', 'planned', 'routers', 'controlled'),
  [
    ('mixture_of_depths', {'depth__capacity': 0.25}, 0.25, ROUTER + 2 * (WIDTH + 1), False),
    ('token_gate', {'depth__estimator': 'random', 'depth__open': 0.3}, 0.3, ROUTER, False),
    ('token_gate', {'depth__open': 0.3}, 1.0, ROUTER, True),
    ('layer_gate', {'depth__estimator': 'random', 'depth__open': 0.3}, 0.3, 0, False),
    ('layer_gate', {'depth__open': 0.3}, 1.0, 0, True),
  ],
)
def test_a_gate_that_was_not_measured_is_charged_as_planned(
  depth, fields, planned, routers, controlled
):
  ledger = ledger_of(depth, **fields)
  ungated = HEAD + LAYERS * routers
  assert cost.forward_flops(ledger, {}) == pytest.approx(ungated + LAYERS * planned * BLOCK)
  measured = cost.forward_flops(ledger, {}, {'depth_0': 0.5, 'depth_1': 0.125})
  assert measured == pytest.approx(ungated + 0.625 * BLOCK)
  # A controller moves learned gates alone.
  closed = ungated + (0 if controlled else LAYERS * planned * BLOCK)
  assert cost.flops_range(ledger, {})[0] == pytest.approx(closed)


def test_a_gate_inside_a_gate_multiplies_with_it():
  ledger = ledger_of('token_gate', 'head_gate')
  active = {
    'depth_0': 0.5,
    'block_0/attention/attention': 0.25,
    'depth_1': 0.75,
    'block_1/attention/attention': 1.0,
  }
  inside = INPUTS + HEADS * ROUTER + MLP  # gated by the layer's gate alone
  want = HEAD + LAYERS * ROUTER + 0.5 * (inside + 0.25 * HEADS_OWN) + 0.75 * (inside + HEADS_OWN)
  assert cost.forward_flops(ledger, {}, active) == pytest.approx(want)


@pytest.mark.parametrize('mlp', ['moe_topk', 'expert_choice'])
def test_experts_inside_a_gated_layer_multiply_with_it(mlp):
  visits = {'mlp__k': 2} if mlp == 'moe_topk' else {'mlp__visits': 2.0}
  ledger = ledger_of('token_gate', mlp=mlp, mlp__experts=EXPERTS, **visits)
  active = {'depth_0': 0.5, 'block_0/mlp': 0.75, 'depth_1': 1.0, 'block_1/mlp': 1.0}
  inside = INPUTS + HEADS_OWN + EXPERTS * ROUTER
  want = HEAD + LAYERS * ROUTER + 0.5 * (inside + 0.75 * 2 * MLP) + (inside + 2 * MLP)
  assert cost.forward_flops(ledger, {}, active) == pytest.approx(want)


def test_nested_gates_cost_the_joint_fraction_of_each_token():
  # Heads open where the token enters: the product of their means is two thirds of what runs.
  ledger = ledger_of('token_gate', 'head_gate')
  draw = np.random.default_rng(0)
  enters, heads = draw.integers(0, 2, (3, LENGTH)), draw.integers(0, HEADS + 1, (3, LENGTH)) / HEADS
  heads = heads * enters
  sown = {'depth_0': enters, 'block_0/attention/attention': heads, 'depth_1': np.ones((3, 1))}
  found = cost.open_fractions(ledger, {path: jnp.float32(a) for path, a in sown.items()})
  joint = sum(enters[at] * heads[at] for at in np.ndindex(3, LENGTH)) / (3 * LENGTH)
  assert joint > 1.4 * enters.mean() * heads.mean()
  assert found['depth_0&block_0/attention/attention'] == pytest.approx(joint)
  assert found['depth_0'] == pytest.approx(enters.mean())
  # A gate that sowed nothing counts as planned, and one for whole sequences as each of their tokens.
  assert found['depth_1'] == found['depth_1&block_1/attention/attention'] == 1
  inside = INPUTS + HEADS * ROUTER + MLP
  want = HEAD + LAYERS * ROUTER + enters.mean() * inside + joint * HEADS_OWN + inside + HEADS_OWN
  assert cost.forward_flops(ledger, {}, found) == pytest.approx(want)


def test_selected_units_of_gated_layers_are_measured_together(tiny_config):
  fields = {'depth.name': 'token_gate', 'activation.name': 'statistical_topk'}
  run = setup(tiny_config(**fields))
  state = run.program.init(3, run.target)
  params, model = state.trainable['params'], run.program.model
  params['depth_0']['router']['bias'] = jnp.zeros(1)
  _, observed = separated(evaluate(run, params, state.model_state))
  both, count = 0.0, 0
  for tokens, weight in run.data.eval_batches('validation', ''):
    if not weight.all():
      continue
    _, seen = model.apply({'params': params}, tokens[:, :-1], mutable=['gates', 'intermediates'])
    sown = seen['gates']
    for at in np.ndindex(weight.shape):
      units = float(sown['block_0']['mlp']['activation']['active'][at])
      both += float(sown['depth_0']['active'][at]) * units
      count += 1
  active = observe.activity(observed)
  joint = active['depth_0&block_0/mlp/activation']
  assert joint == pytest.approx(both / count, rel=1e-4)
  assert 0 < joint < active['depth_0'] < 1
  report = train_cost.report(run.program, run.target, observed=observed)
  down = run.program.costs.ledger['block_0/mlp/down/linear'].flops
  rest = {path: m for path, m in run.program.costs.ledger.items() if 'down' not in path}
  want = cost.forward_flops(rest, {}, {'depth_0': active['depth_0']}) + joint * down
  assert report['flops_forward'] == pytest.approx(want)


def test_a_report_counts_gates_as_observed_and_training_as_planned():
  program, target = build(small('token_gate', 'head_gate'), VOCAB)
  observed = {
    'gates/depth_0': 0.5,
    'gates/block_0/attention/attention': 0.25,
    'gates/depth_1': 0.75,
    'block_0/mlp/active': 0.001,  # an observation of an activation that is no gate
  }
  report = train_cost.report(program, target, observed=observed)
  inside = INPUTS + HEADS * ROUTER + MLP
  flops = HEAD + LAYERS * ROUTER + 0.5 * (inside + 0.25 * HEADS_OWN) + 0.75 * (inside + HEADS_OWN)
  dense = HEAD + LAYERS * BLOCK
  assert report['flops_forward'] == pytest.approx(flops)
  assert report['flops_forward_ratio'] == pytest.approx(flops / dense)
  to_keys = (0.5 * 0.25 + 0.75) * 2 * TO_KEYS
  assert report['active_params'] == round((flops - to_keys) / 2)  # no weights in scores and values
  every_gate_open = dense + LAYERS * (ROUTER + HEADS * ROUTER)
  assert report['flops_training'] == pytest.approx(3 * every_gate_open)
  assert report['flops_training_ratio'] == pytest.approx(every_gate_open / dense)
  routers = LAYERS * (1 + HEADS) * (WIDTH + 1)
  assert report['params'] - report['dense_params'] == routers
  unseen = train_cost.report(program, target)
  assert unseen['flops_forward'] == pytest.approx(every_gate_open)


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_training_is_charged_for_closed_gates_with_any_estimator(estimator):
  fields = {'depth__estimator': estimator, 'depth__open': 0.3}
  program, target = build(small('token_gate', **fields), VOCAB)
  forward = HEAD + LAYERS * (ROUTER + BLOCK)
  passes = 4 if estimator == 'reinforce' else 3  # its baseline is a second forward pass
  report = train_cost.report(program, target)
  assert report['flops_training'] == pytest.approx(passes * forward)
  assert report['flops_training_ratio'] == pytest.approx(
    passes / 3 * forward / (HEAD + LAYERS * BLOCK)
  )


@pytest.mark.parametrize(
  'fields',
  [
    {'activation__name': 'topk', 'activation__density': 0.25},
    {'mlp__name': 'predictor_topk', 'mlp__density': 0.25},
  ],
)
def test_training_computes_the_units_that_are_not_selected(fields):
  config = small(mlp=fields.get('mlp__name', 'dense'))
  with config.unlocked():
    for field, value in fields.items():
      group, key = field.split('__')
      config[group][key] = value
  program, target = build(config, VOCAB)
  # A predictor and its MLP have as many weights as the plain MLP.
  assert train_cost.report(program, target)['flops_training_ratio'] == pytest.approx(1)


def test_routers_of_fixed_capacity_leave_tokens_out_of_training():
  seats = LENGTH // 4
  program, target = build(small('mixture_of_depths', depth__capacity=0.25), VOCAB)
  # A quarter of the tokens enters, and has a quarter of the keys to read.
  entered = (BLOCK - 2 * TO_KEYS + 2 * (2 * seats * WIDTH)) * seats / LENGTH
  forward = HEAD + LAYERS * (ROUTER + 2 * (WIDTH + 1) + entered)
  assert train_cost.report(program, target)['flops_training'] == pytest.approx(3 * forward)


def test_a_report_takes_each_gate_times_the_density_of_its_kernels():
  dense = ('head', 'embed', 'norm', 'router', 'attention')
  own = {f'weight__{key}': value for key, value in slots.defaults('weight', 'static').items()}
  sparse = own | {'weight__name': 'static', 'weight__sparsity': 0.75, 'weight__dense': dense}
  program, target = build(small('token_gate', **sparse), VOCAB)
  report = train_cost.report(program, target, observed={'gates/depth_0': 0.5, 'gates/depth_1': 0})
  rest = INPUTS + HEADS_OWN
  assert report['flops_forward'] == pytest.approx(HEAD + LAYERS * ROUTER + 0.5 * (rest + MLP / 4))


GATED = {'depth.name': 'token_gate', 'attention.name': 'head_gate', 'mlp.name': 'expert_choice'}


def test_evaluation_observes_every_gate_of_the_ledger(tiny_config):
  run = setup(tiny_config(model__layers=2, **{**GATED, 'mlp.experts': 2}))
  state = run.program.init(0, run.target)
  params, _ = run.program.finalize(state)
  # Depth gates at known logits: the first lets everything through, the second nothing.
  for layer, bias in (('depth_0', 30.0), ('depth_1', -30.0)):
    params[layer]['router'] = jax.tree.map(
      lambda a, bias=bias: jnp.full_like(a, bias if a.ndim == 1 else 0), params[layer]['router']
    )
  _, observed = separated(evaluate(run, params, state.model_state))
  active = observe.activity(observed)
  ledger = run.program.costs.ledger
  single = {gate.path for m in ledger.values() for gate in m.gates}
  nested = {
    f'depth_{i}&block_{i}/{inner}' for i in (0, 1) for inner in ('attention/attention', 'mlp')
  }
  assert active.keys() == single | nested and len(single) == 6
  assert (active['depth_0'], active['depth_1']) == (1.0, 0.0)
  assert active['depth_0&block_0/mlp'] == pytest.approx(active['block_0/mlp'], rel=1e-5)
  assert active['depth_1&block_1/mlp'] == 0
  summary = observe.summary(observed)
  loads = [observed[f'block_{i}/mlp/dead_experts'] for i in (0, 1)]
  assert summary['dead_experts'] == pytest.approx(np.mean(loads))
  assert not any(name.isdigit() or name.startswith('depth') for name in summary)
