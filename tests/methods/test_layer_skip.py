"""Layer dropout, rotating exits and their losses, against closed forms and a forward pass by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.layers.progress import Progress
from sparse_lm.layers.sow import Exit
from sparse_lm.layers.tokens import Tokens
from sparse_lm.methods.stack.layer_skip import LayerSkip
from sparse_lm.model import lm, plans
from sparse_lm.plan import cost, executed
from sparse_lm.runs.setup import setup
from sparse_lm.train.objective import Batch, EffectiveParams

LAYERS, STEPS, SEQUENCES, VOCAB = 5, 40, 4000, 11


@pytest.fixture(scope='module')
def spec(tiny_config):
  return lm.from_config(tiny_config(model__layers=LAYERS), VOCAB).spec


def run_on_zeros(method, step):
  """The stream after layers that each set a bit of their own, and the exits that were sown."""
  layers = [
    functools.partial(lambda bit, tokens, mode: tokens.x + bit, 2.0**i) for i in range(LAYERS)
  ]
  shape = SEQUENCES, 1
  progress = Progress(jnp.int32(step), STEPS)
  tokens = Tokens(jnp.zeros((*shape, 1)), jnp.zeros(shape, int), jnp.ones(shape, bool))
  draws = {'dropout': jax.random.key(step)}
  given = layers, tokens.replace(progress=progress), 'train'
  x, sown = method.apply({}, *given, rngs=draws, mutable=['exits'])
  exits = jax.tree.leaves(sown, is_leaf=lambda node: isinstance(node, Exit))
  return np.asarray(x).reshape(-1).astype(int), exits


@pytest.mark.parametrize('grows', [False, True])
def test_layers_are_dropped_as_often_as_the_paper_says(grows, spec):
  method = LayerSkip(spec, dropout=0.8, grows=grows)
  for step in (0, 13, STEPS - 1):
    bits, _ = run_on_zeros(method, step)
    dropped = [np.mean(bits >> layer & 1 == 0) for layer in range(LAYERS)]
    growth = np.exp(step * np.log(2) / (STEPS - 1)) - 1 if grows else 1.0
    want = 0.8 * growth * (np.exp(np.arange(LAYERS) * np.log(2) / (LAYERS - 1)) - 1)
    deviation = np.sqrt(want * (1 - want) / SEQUENCES)
    assert (np.abs(dropped - want) <= 4.5 * deviation).all(), (dropped, want)


@pytest.mark.parametrize('exits', ['::2', '1:2', ':', '-1:'])
def test_exits_roll_by_a_layer_a_step(exits, spec):
  method = LayerSkip(spec, dropout=0.0, exits=exits, scale=0.3)
  enabled = np.zeros(LAYERS, bool)
  enabled[[*range(LAYERS)][slice(*(int(part) if part else None for part in exits.split(':')))]] = (
    True
  )
  for step in range(7):
    _, found = run_on_zeros(method, step)
    layers = {int(own.x_BxLxD[0, 0, 0]).bit_length() - 1: float(own.weight) for own in found}
    on = np.roll(enabled, step)
    want = dict.fromkeys(np.flatnonzero(on), 0.3)
    if LAYERS - 1 in want:  # it always predicts, at weight 1, and no second time
      want[LAYERS - 1] = 0.0
    assert layers == pytest.approx(want)


@pytest.fixture(scope='module')
def run(tiny_config):
  """Three layers whose dropout no draw reaches, at seven steps, with a head that is not zero."""
  fields = {'stack.name': 'layer_skip', 'stack.dropout': 0.0, 'stack.scale': 0.4}
  return setup(tiny_config(**fields, **{'model.layers': 3, 'model.init': 'gpt2', 'train.steps': 7}))


def nats_by_layer(model, params, tokens):
  """Cross-entropy of norm and head after each layer, one module after the other."""
  x, found = np.asarray(params['embed']['tokens'])[tokens[:, :-1]], []
  for layer in range(model.spec.layers):
    own = {name: params[name] for name in (f'block_{layer}',)}
    one = lm.Layer(model.spec, model.slots, layer, model.site)
    x = np.asarray(one.apply({'params': own}, x))
    unit = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5)
    logits = np.float64(
      unit * params['norm']['scale'] @ np.asarray(params['embed']['head']['kernel'])
    )
    likely = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    found.append(-np.mean(np.take_along_axis(likely, tokens[:, 1:, None], axis=-1)))
  return found


def test_the_loss_is_the_weighted_mean_of_layers_by_hand(run):
  objective, state = run.program.objective, run.program.init(0, run.target)
  tokens = next(run.data.train_iterator(0))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda w: w + draw.normal(0, 0.2, w.shape), state.trainable['params'])
  effective = EffectiveParams(params, {}, 0.0)
  loss = jax.jit(lambda state: objective.loss(effective, state, {}, Batch(tokens, None), state.key))
  nats = nats_by_layer(run.program.model, jax.device_get(params), np.asarray(tokens))
  assert max(nats) - min(nats) > 1e-3  # or no weight would show
  # Below the last layer, as '::2' of three layers rolls.
  for step, on in enumerate([(0,), (0, 1), (1,), (0,)]):
    total, beside = loss(state.replace(step=jnp.int32(step)))
    want = (nats[-1] + 0.4 * sum(nats[layer] for layer in on)) / (1 + 0.4 * len(on))
    assert_allclose(total, want, rtol=1e-5)
    assert_allclose(beside.metrics['exits_loss'], want, rtol=1e-5)
    assert_allclose(beside.metrics['loss'], nats[-1], rtol=1e-5)


def test_without_dropout_every_mode_is_a_plain_stack_to_the_bit(run):
  model = run.program.model
  plain = model.clone(stack=lm.dense_twin(model).stack)
  assert plain.stack.name == 'sequential'
  tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, model.spec.vocab)
  params = run.program.init(0, run.target).trainable['params']
  for mode in ('train', 'eval', 'decode'):
    logits = [
      jax.jit(lambda p, m=m, mode=mode: m.apply({'params': p}, tokens, mode))(params)
      for m in (model, plain)
    ]
    assert_array_equal(*logits)


def test_training_is_charged_a_head_for_each_exit(run):
  model = run.program.model
  plain = model.clone(stack=lm.dense_twin(model).stack)
  ledgers = [plans.ledger(m, model.spec.context, 'train') for m in (model, plain)]
  head = 'embed/head/linear'
  assert ledgers[0][head].flops == 3 * ledgers[1][head].flops
  assert {**ledgers[0], head: ledgers[1][head]} == ledgers[1]
  assert plans.ledger(model, model.spec.context) == plans.ledger(plain, model.spec.context)
  traced = plans.traced(model, model.spec.context, 'train')
  assert executed.NO_REASON not in executed.differences(cost.ungated(ledgers[0]), traced)


def test_a_run_that_goes_on_from_a_state_draws_and_rolls_as_one_that_did_not_stop(run, tiny_config):
  program = run.program
  method = dataclasses.replace(program.model.stack, fields=(('dropout', 0.9), ('exits', '::2')))
  objective = dataclasses.replace(program.objective, model=program.model.clone(stack=method))
  program = dataclasses.replace(program, objective=objective)
  batches = run.data.train_iterator(0)
  tokens = [next(batches) for _ in range(6)]
  state = program.init(0, run.target)
  losses, middle = [], None
  for step in range(6):
    if step == 3:
      middle = jax.device_get(state.replace(key=None))
    state, metrics = program.step(step)(state, tokens[step])
    losses.append(float(metrics['exits_loss']))
  again = jax.device_put(middle).replace(key=program.init(0, run.target).key)
  for step in (3, 4, 5):
    again, metrics = program.step(step)(again, tokens[step])
    assert float(metrics['exits_loss']) == losses[step]
  # Neither is so because the step did not matter.
  moved = jax.device_put(middle).replace(key=program.init(0, run.target).key, step=jnp.int32(4))
  assert float(program.step(4)(moved, tokens[3])[1]['exits_loss']) != losses[3]


def test_exits_outside_the_layers_are_refused(tiny_config):
  for exits in ('3:', '1,2', 'all'):
    with pytest.raises(UserError, match=f"config.stack.exits='{exits}'.*(of the 3 layers|slice)"):
      lm.from_config(
        tiny_config(model__layers=3, stack__name='layer_skip', stack__exits=exits), VOCAB
      )
  with pytest.raises(UserError, match=r'config\.model\.bigram=True is not valid; valid: False'):
    lm.from_config(tiny_config(stack__name='layer_skip', model__bigram=True), VOCAB)
