"""One contract for every method in every slot, found by folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import rng, tree
from sparse_lm.core import units as pattern
from sparse_lm.layers.sow import SOWN
from sparse_lm.model import lm, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import sites
from sparse_lm.runs import cost_report as train_cost
from sparse_lm.runs.at_start import prune_at_start
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.setup import setup
from sparse_lm.signals import from_calibration
from sparse_lm.train.step import Program
from sparse_lm.weights import rewire
from sparse_lm.weights.score import APPLIES

NAMES = [(slot, name) for slot in slots.SLOTS if slot != 'weight' for name in slots.names(slot)]
LAYERS = pytest.mark.parametrize(('slot', 'name'), NAMES)
IN_SOME_LAYERS = pytest.mark.parametrize(
  ('slot', 'name'), [found for found in NAMES if found[0] in lm.LAYER_SLOTS]
)
# Every weight method with its defaults, and one score with each way to apply its mask.
CONFIGS = {name: {'name': name} for name in slots.names('weight')}
CONFIGS |= {
  f'magnitude {apply}': {'name': 'magnitude', 'apply': apply, 'start': 0.0, 'end': 0.5}
  for apply in APPLIES[1:]
}
WEIGHTS = {name: slots.method('weight', fields['name']) for name, fields in CONFIGS.items()}
# Methods that ask for signals of calibration text prune trained models and do not train.
TRAINING = {name: cls for name, cls in WEIGHTS.items() if not from_calibration(cls.traits.needs)}
STEPS = 12


def over_weights(methods, such_that=lambda traits: True):
  return pytest.mark.parametrize('name', [n for n, cls in methods.items() if such_that(cls.traits)])


TRAINED = over_weights(TRAINING)
EXACT = over_weights(TRAINING, lambda traits: traits.masked and traits.exact_density)
# Controlled methods learn how sparse they are: zero is all that their config takes.
FIXED = over_weights(TRAINING, lambda traits: not traits.controlled)
ALL = np.ones((2, 16), bool)  # every token is valid


@pytest.fixture
def model_of(tiny_config):
  """`model_of(slot, name) -> (model, variables, tokens)`, with every parameter drawn at random."""

  def build(slot, name):
    model = lm.from_config(tiny_config(**{f'{slot}.name': name}), vocab=11)
    return model, random_variables(model), jax.random.randint(jax.random.key(0), (2, 16), 0, 11)

  return build


@functools.cache
def random_variables(model):
  # The head starts at zero, and equal logits would hide any leak.
  variables = plan_of(model).variables
  leaves, structure = jax.tree.flatten(variables['params'])
  draw = np.random.default_rng(0).normal
  # Norms' scales around a half; a gate of one number stays open, and short of saturation.
  means = {0: 0.2, 1: 0.5}
  params = [
    draw(means.get(a.ndim, 0.0), 0.3 * (a.ndim > 0), a.shape).astype(np.float32) for a in leaves
  ]
  tokens = jnp.zeros((1, 16), jnp.int32)
  others = {name for name in variables if name not in ('params', *SOWN)}
  drawn = jax.jit(model.init)(jax.random.key(1), tokens) if others else {}
  return {**{name: drawn[name] for name in others}, 'params': structure.unflatten(params)}


@functools.cache
def forward(model, mode):
  """`(variables, tokens, valid) -> (logits, what was sown)`. Cached: most methods share defaults."""

  def run(variables, tokens, valid):
    draws = {'dropout': jax.random.key(3), 'gates': jax.random.key(4)}
    mutable = [*SOWN, *(name for name in variables if name != 'params')]
    return model.apply(variables, tokens, mode=mode, valid_BxL=valid, rngs=draws, mutable=mutable)

  return run


@functools.cache
def logits_of(model, mode):
  run = forward(model, mode)
  return lambda *arguments: run(*arguments)[0]


@LAYERS
def test_loss_and_gradients_are_finite(slot, name, model_of):
  model, variables, tokens = model_of(slot, name)

  @jax.jit
  def loss(params):
    logits, sown = forward(model, 'train')({**variables, 'params': params}, tokens, ALL)
    auxiliary = sum(jax.tree.leaves(sown.get('losses', {})), 0.0)
    return auxiliary - jnp.mean(jax.nn.log_softmax(logits[:, :-1])[..., 0])

  value, grads = jax.value_and_grad(loss)(variables['params'])
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  # What the slot's method computes must reach the loss: no parameter is left without a gradient.
  assert not [path for path, g in tree.named(grads).items() if not np.abs(g).any()]


@pytest.mark.parametrize('mode', ['train', 'eval'])
@LAYERS
def test_model_without_jit_equals_jit_and_keeps_to_the_past(slot, name, mode, model_of):
  model, variables, tokens = model_of(slot, name)
  run = jax.jit(logits_of(model, mode))
  logits = run(variables, tokens, ALL)
  assert logits.shape == (2, 16, 11) and logits.dtype == jnp.float32
  if mode == 'train':  # a slow test below evaluates without jit
    assert_allclose(logits_of(model, mode)(variables, tokens, ALL), logits, rtol=1e-4, atol=1e-4)
  if lm.batch_independent(model)[mode]:
    # Another sequence beside the first one; tests/model/test_batch.py shows that the others couple.
    beside = run(variables, tokens.at[1].set((tokens[1] + 1) % 11), ALL)
    assert_allclose(beside[0], logits[0], rtol=1e-6, atol=1e-6)
  if not lm.causal(model)[mode]:
    return  # tests/methods/ shows that these leak
  for cut in (1, 8, 15):
    # A hard router's leak has zero gradient, so tokens are substituted instead.
    other = run(variables, tokens.at[:, cut:].set((tokens[:, cut:] + 1) % 11), ALL)
    assert_allclose(other[:, :cut], logits[:, :cut], rtol=1e-6, atol=1e-6)
    assert (np.abs(other[:, cut] - logits[:, cut]) > 1e-3).any(axis=-1).all()


@LAYERS
def test_a_token_that_is_not_valid_is_not_read(slot, name, model_of):
  model, variables, tokens = model_of(slot, name)
  run = jax.jit(logits_of(model, 'eval'))
  valid = ALL & (np.arange(16) != 5)
  changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % 11)
  before, after = run(variables, tokens, valid), run(variables, changed, valid)
  others = np.arange(16) != 5
  assert_allclose(after[:, others], before[:, others], rtol=1e-6, atol=1e-6)
  # The same substitution shows where the token is valid.
  seen = run(variables, changed, ALL) - run(variables, tokens, ALL)
  assert np.abs(seen[:, 6:]).max() > 1e-3


@IN_SOME_LAYERS
def test_method_may_be_named_for_some_layers(slot, name, tiny_config):
  choice = {f'{slot}.name': name, f'{slot}.layers': '1::2'}
  assert plan_of(lm.from_config(tiny_config(model__layers=2, **choice), vocab=11)).variables


@pytest.mark.slow
@LAYERS
def test_every_point_of_a_layer_can_be_read_by_name(slot, name, model_of):
  model, variables, tokens = model_of(slot, name)
  plan = plan_of(model)
  # Every matrix has a name for what it multiplies.
  assert plan.inputs.keys() == {m.kernel for m in plan.ledger.values() if m.kind == 'linear'}
  logits, values = jax.jit(lambda v, t: sites.run(model, v, t, read=['*']))(variables, tokens)
  assert values.keys() == plan.sites.keys()
  assert {name: (v.ndim, v.dtype) for name, v in values.items()} == {
    name: (len(site.shape), site.dtype) for name, site in plan.sites.items()
  }
  # Reading changes nothing, and neither does jit.
  assert_allclose(logits, model.apply(variables, tokens), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def trained(tiny_config):
  """`trained(name, sparsity) -> (setup, states, metrics)`, every state of a run on the host."""

  @functools.cache
  def run(name, sparsity):
    own = config_of(name, sparsity)
    if 'period' in slots.defaults('weight', CONFIGS[name]['name']):
      own['weight.period'] = 4
    # Three masked leaves of two shapes: selection is what takes long to compile.
    own['weight.dense'] = ('embed', 'norm', 'query', 'key', 'value')
    # A head that is not zero: gradients reach all weights from the first step on.
    prepared = setup(tiny_config(optimizer__ema=0.9, model__init='gpt2', **own))
    program = prepared.program
    state = prune_at_start(prepared, program.init(0, prepared.target))
    batches = prepared.data.train_iterator(rng.data_seed(0))
    states, logged = [jax.device_get(state)], []
    for step in range(STEPS):
      state, metrics = program.step(step)(state, next(batches))
      assert all(np.isfinite(value) for value in metrics.values()), metrics
      states.append(jax.device_get(state))
      logged.append(jax.device_get(metrics))
    return prepared, states, logged

  return run


def sparsity_for(name):
  traits = WEIGHTS[name].traits
  return 0.8 if traits.masked and not traits.controlled else 0.0


def config_of(name, sparsity):
  return {f'weight.{field}': value for field, value in CONFIGS[name].items()} | {
    'weight.sparsity': sparsity
  }


@over_weights(TRAINING, lambda traits: traits.masked)
def test_what_the_final_masks_drop_is_zero(name, trained):
  run, states, _ = trained(name, sparsity_for(name))
  params, masks = (tree.named(found) for found in run.program.finalize(states[-1]))
  assert len(masks) == 3
  for path, mask in masks.items():
    assert not np.asarray(params[path])[~np.asarray(mask)].any()
  assert not all(np.asarray(mask).all() for mask in masks.values())


@EXACT
def test_target_is_met_exactly_at_the_end(name, trained):
  run, states, _ = trained(name, sparsity_for(name))
  _, masks = run.program.finalize(states[-1])
  # Matrices of 256, 512 and 512 weights: a fifth is 51.2 and 102.4, kept as 51 and 102.
  counts = sorted(int(mask.sum()) for mask in jax.tree.leaves(masks))
  assert sum(counts) == 255
  if not run.program.method.units.spans_layers:  # they compete for the weights that are kept
    assert counts == [51, 102, 102]


@TRAINED
def test_dropped_weights_are_zero_after_every_step(name, trained):
  run, states, _ = trained(name, sparsity_for(name))
  dropped_ever = 0
  for state in states:
    masks = tree.named(state.sparse.masks)
    dropped_ever += sum(int((~mask).sum()) for mask in masks.values())
    for held in (state.trainable, state.ema):
      weights = tree.named(held['params'])
      awake = {path: int((weights[path][~mask] != 0).sum()) for path, mask in masks.items()}
      assert not any(awake.values()), (int(state.step), awake)
  _, masks = run.program.finalize(states[-1])
  alive = [(weights[path][~mask] != 0).any() for path, mask in tree.named(masks).items()]
  if tree.named(states[-1].sparse.masks):
    assert dropped_ever and not any(alive)
  else:  # dropped weights live on in methods that store no masks
    assert all(alive)


@FIXED
def test_sparsity_zero_equals_dense(name, trained):
  run, states, logged = trained(name, 0.0)
  _, dense_states, dense_logged = trained('none', 0.0)
  losses, dense_losses = ([m['loss'] for m in found] for found in (logged, dense_logged))
  steps = range(STEPS)
  if run.program.method.traits.replaces_step:  # its updates rest where the dense twin takes a step
    steps = range(next((step for step in steps if run.program.method.due(step)), STEPS))
  assert len(steps) > 3
  assert_allclose(losses[: len(steps)], dense_losses[: len(steps)], rtol=1e-5)
  jax.tree.map(
    functools.partial(assert_allclose, rtol=1e-3, atol=1e-5),
    states[len(steps)].trainable['params'],
    dense_states[len(steps)].trainable['params'],
  )


@TRAINED
def test_sweep_shares_one_executable(name, trained):
  one, _, _ = trained(name, 0.0)
  other, _, _ = trained(name, sparsity_for(name))
  assert one.program is other.program
  one.program.train_step(one.program.init(7, other.target), next(one.data.train_iterator(7)))
  assert one.program.init.compiled._cache_size() == 1
  assert one.program.train_step._cache_size() == 1
  assert one.program.mask_update_step._cache_size() <= 1


@TRAINED
def test_training_costs_what_the_config_predicts(name, trained):
  run, _, logged = trained(name, sparsity_for(name))
  meter = run.meter()
  work = run.inherited.plus(meter.at_start())
  for step, metrics in enumerate(logged):
    work = work.plus(meter.step(step, float(metrics['flops_pass'])))
  target = {path: float(density) for path, density in tree.named(run.target).items()}
  spent = work.over(train_cost.tokens(run.config, STEPS))
  # Whole counts of small matrices differ a little from the density that was asked for.
  assert spent.own == pytest.approx(train_cost.predicted(run.program, target), rel=2e-3)
  assert spent.ancestors == 0


@functools.cache
def compiled_gradients(program):
  return jax.jit(program._gradients)


def sorted_topk(scores, counts):
  def matrix(scores, k):
    order = jnp.argsort(-scores, axis=None, stable=True)
    return (jnp.argsort(order) < k).reshape(scores.shape)

  each = (jnp.broadcast_to(k, array.shape[:-2]) for array, k in zip(scores, counts))
  return [pattern.per_matrix(matrix, array, k) for array, k in zip(scores, each)]


@pytest.mark.slow
@TRAINED
def test_steps_without_jit_equal_jit(name, trained, monkeypatch):
  run, states, _ = trained(name, sparsity_for(name))
  # Every method's model and, but for a price on their density, loss.
  plain = run if run.program.method.traits.controlled else trained('none', 0.0)[0]
  gradients = compiled_gradients(plain.program)

  def with_jit(_, *arguments):
    with jax.disable_jit(False):
      return gradients(*arguments)

  due = [step for step in range(STEPS) if run.program.method.due(step)]
  batches = run.data.train_iterator(rng.data_seed(0))
  tokens = [next(batches) for _ in range(STEPS)]
  # The model is tested above, and takes long to run operation by operation, as a bisection does.
  monkeypatch.setattr(Program, '_gradients', with_jit)
  monkeypatch.setattr(pattern, 'topk_masks', sorted_topk)
  monkeypatch.setattr(rewire, 'topk_masks', sorted_topk)
  for step in {due[-1] if due else STEPS - 1, STEPS - 1}:
    with jax.disable_jit():
      state, _ = run.program.step(step)(jax.device_put(states[step]), tokens[step])
    jax.tree.map(assert_array_equal, state.sparse, states[step + 1].sparse)
    close = functools.partial(assert_allclose, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, state.trainable, states[step + 1].trainable)
    jax.tree.map(close, state.ema, states[step + 1].ema)


@TRAINED
def test_save_and_restore_round_trip(name, trained, tmp_path):
  run, states, _ = trained(name, sparsity_for(name))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(states[-1], run.data.train_iterator(0))
  restored = checkpoints.restore(run.program.init(1, run.target))
  checkpoints.close()
  # The run's key is not stored: it follows from the seed, which the template has.
  restored, want = restored.replace(key=None), states[-1].replace(key=None)
  assert jax.tree.structure(restored) == jax.tree.structure(want)
  jax.tree.map(assert_array_equal, restored, want)


@pytest.mark.parametrize(
  ('start', 'end'),
  [
    (0.0, 0.0),
    (0.25, 0.75),
    *(pytest.param(0.5, end, marks=pytest.mark.slow) for end in (0.5, 1.0)),
  ],
)
@EXACT
def test_target_is_met_on_any_span_that_is_accepted(name, start, end, steps=7):
  own, given = CONFIGS[name], {'start': start, 'end': end, 'period': 3}
  given = {field: given[field] for field in given if field in slots.defaults('weight', own['name'])}
  given = own | given
  method = slots.method('weight', given.pop('name'))(total_steps=steps, **given)
  params = {'w': jax.random.normal(jax.random.key(0), (8, 10))}
  target = {'w': jnp.float32(0.25)}
  trainable, sparse = method.init(jax.random.key(1), params, target)
  signals = {need: {'w': params['w'][::-1]} for need in method.traits.needs}
  before = [] if method.batches_at_start is None else [0]
  for step in [*before, *filter(method.due, range(steps))]:
    change = method.update(trainable, sparse, signals, jnp.int32(step), jax.random.key(2))
    trainable, sparse = change.trainable, change.sparse
  _, masks = method.finalize(trainable, sparse, jnp.int32(steps))
  assert int(masks['w'].sum()) == 20
