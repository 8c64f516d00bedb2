"""One contract for every method in every slot, found by folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import rng, slots, tree
from sparse_lm.model import lm
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.setup import setup

WEIGHT = slots.names('weight')
LAYER = [(slot, name) for slot in lm.LAYER_SLOTS for name in slots.names(slot)]
STEPS, SPARSITY = 12, 0.8


def test_every_slot_has_methods():
  # An empty folder would leave the tests below without cases, and they would pass.
  assert all(slots.names(slot) for slot in slots.SLOTS)


# --- Slots of the model -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def model_of(tiny_config):
  """`model_of(slot, name) -> (model, variables, tokens)`, with every parameter drawn at random."""

  @functools.cache
  def build(slot, name):
    model = lm.from_config(tiny_config(**{f'{slot}.name': name}), vocab=11)
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 11)
    variables = jax.jit(model.init)(jax.random.key(1), tokens)
    # The head starts at zero, and equal logits would hide any leak.
    leaves, structure = jax.tree.flatten(variables['params'])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [w + 0.3 * jax.random.normal(key, w.shape) for key, w in zip(keys, leaves)]
    return model, {**variables, 'params': structure.unflatten(noisy)}, tokens

  return build


def forward(model, mode, variables, tokens, valid=None):
  draws = {'dropout': jax.random.key(3), 'gates': jax.random.key(4)}
  others = [name for name in variables if name != 'params']
  sown = ['losses', 'stats', *others]
  logits, _ = model.apply(
    variables, tokens, mode=mode, valid_BxL=valid, rngs=draws, mutable=sown
  )
  return logits


@pytest.mark.parametrize(('slot', 'name'), LAYER)
def test_loss_and_gradients_are_finite(slot, name, model_of):
  model, variables, tokens = model_of(slot, name)

  def loss(params):
    logits = forward(model, 'train', {**variables, 'params': params}, tokens)
    return -jnp.mean(jax.nn.log_softmax(logits[:, :-1])[..., 0])

  value, grads = jax.jit(jax.value_and_grad(loss))(variables['params'])
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  # What the slot's method computes must reach the loss: no parameter is left without a gradient.
  assert not [path for path, g in tree.named(grads).items() if not np.abs(g).any()]


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize(('slot', 'name'), LAYER)
def test_model_without_jit_equals_jit_and_keeps_to_the_past(slot, name, mode, model_of):
  model, variables, tokens = model_of(slot, name)
  run = jax.jit(functools.partial(forward, model, mode))
  logits = run(variables, tokens)
  assert logits.shape == (2, 16, 11) and logits.dtype == jnp.float32
  assert_allclose(forward(model, mode, variables, tokens), logits, rtol=1e-4, atol=1e-4)
  if not declares_causal(slots.method(slot, name), mode):
    return
  for cut in (1, 8, 15):
    # A hard router's leak has zero gradient, so tokens are substituted instead.
    other = run(variables, tokens.at[:, cut:].set((tokens[:, cut:] + 1) % 11))
    assert_allclose(other[:, :cut], logits[:, :cut], rtol=1e-6, atol=1e-6)
    assert (np.abs(other[:, cut] - logits[:, cut]) > 1e-3).any(axis=-1).all()


def declares_causal(cls, mode):
  """Causal unless the class says otherwise, for all modes or (a mapping) for some."""
  causal = getattr(cls, 'causal', True)
  return causal.get(mode, True) if isinstance(causal, dict) else causal


@pytest.mark.parametrize(('slot', 'name'), LAYER)
def test_a_token_that_is_not_valid_is_not_read(slot, name, model_of):
  model, variables, tokens = model_of(slot, name)
  run = jax.jit(functools.partial(forward, model, 'eval'))
  valid = jnp.ones(tokens.shape, bool).at[:, 5].set(False)
  changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % 11)
  others = np.arange(16) != 5
  before, after = run(variables, tokens, valid), run(variables, changed, valid)
  assert_allclose(after[:, others], before[:, others], rtol=1e-6, atol=1e-6)
  assert np.abs(run(variables, changed)[:, 6:] - run(variables, tokens)[:, 6:]).max() > 1e-3


@pytest.mark.parametrize(('slot', 'name'), LAYER)
def test_method_may_be_named_for_some_layers(slot, name, tiny_config):
  choice = {f'{slot}.name': name, f'{slot}.layers': '1::2'}
  model = lm.from_config(tiny_config(model__layers=2, **choice), vocab=11)
  assert lm.ledger(model, 16)


# --- Weight methods -----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tiny_config):
  """`trained(name, sparsity) -> (setup, states, losses)`, every state of a run on the host."""

  @functools.cache
  def run(name, sparsity):
    own = {'weight.period': 4} if 'period' in slots.defaults('weight', name) else {}
    prepared = setup(
      tiny_config(weight__name=name, weight__sparsity=sparsity, optimizer__ema=0.9, **own)
    )
    program = prepared.program
    state = program.init(0, prepared.target)
    batches = prepared.data.train_iterator(rng.data_seed(0))
    states, losses = [jax.device_get(state)], []
    for step in range(STEPS):
      state, metrics = program.step(step)(state, next(batches))
      assert all(np.isfinite(value) for value in metrics.values()), metrics
      states.append(jax.device_get(state))
      losses.append(float(metrics['loss']))
    return prepared, states, losses

  return run


def sparsity_for(name):
  return SPARSITY if slots.method('weight', name).masked else 0.0


@pytest.mark.parametrize('name', WEIGHT)
def test_target_is_met_exactly_at_the_end(name, trained):
  run, states, _ = trained(name, sparsity_for(name))
  params, masks = run.program.finalize(states[-1])
  masks, params = tree.named(masks), tree.named(params)
  for path, density in tree.named(run.target).items():
    if slots.method('weight', name).exact_density:
      assert masks[path].sum() == round(float(density) * masks[path].size), path
    assert not np.asarray(params[path])[~np.asarray(masks[path])].any()
  # 2048 weights in six matrices of 256 or 512: 51.2 and 102.4 are kept as 51 and 102.
  if slots.method('weight', name).exact_density and slots.method('weight', name).masked:
    assert sum(int(mask.sum()) for mask in masks.values()) == 4 * 51 + 2 * 102


@pytest.mark.parametrize('name', WEIGHT)
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
  if slots.method('weight', name).keeps_dense or not slots.method('weight', name).masked:
    assert not dropped_ever
  else:
    assert dropped_ever


@pytest.mark.parametrize('name', WEIGHT)
def test_sparsity_zero_equals_dense(name, trained):
  run, states, losses = trained(name, 0.0)
  _, dense_states, dense_losses = trained('none', 0.0)
  steps = range(STEPS)
  if run.program.method.replaces_step:  # its updates rest where the dense twin takes a step
    steps = range(next((step for step in steps if run.program.method.due(step)), STEPS))
  assert len(steps) > 3
  assert_allclose(losses[: len(steps)], dense_losses[: len(steps)], rtol=1e-5)
  jax.tree.map(
    functools.partial(assert_allclose, rtol=1e-3, atol=1e-5),
    states[len(steps)].trainable['params'],
    dense_states[len(steps)].trainable['params'],
  )


@pytest.mark.parametrize('name', WEIGHT)
def test_sweep_shares_one_executable(name, trained):
  one, _, _ = trained(name, 0.0)
  other, _, losses = trained(name, sparsity_for(name))
  assert one.program is other.program
  state = one.program.init(7, other.target)
  _, metrics = one.program.train_step(state, next(one.data.train_iterator(7)))
  assert float(metrics['loss']) > 0 and losses
  assert one.program.init._cache_size() == 1
  assert one.program.train_step._cache_size() == 1
  assert one.program.rewire_step._cache_size() == any(map(one.program.method.due, range(STEPS)))


@pytest.mark.parametrize('name', WEIGHT)
def test_steps_without_jit_equal_jit(name, trained):
  run, states, _ = trained(name, sparsity_for(name))
  due = [step for step in range(STEPS) if run.program.method.due(step)]
  batches = run.data.train_iterator(rng.data_seed(0))
  tokens = [next(batches) for _ in range(STEPS)]
  # Late steps: the head has left zero by then, so every gradient counts.
  for step in {due[-1] if due else STEPS - 1, STEPS - 1}:
    with jax.disable_jit():
      state, _ = run.program.step(step)(jax.device_put(states[step]), tokens[step])
    jax.tree.map(assert_array_equal, state.sparse, states[step + 1].sparse)
    close = functools.partial(assert_allclose, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, state.trainable, states[step + 1].trainable)
    jax.tree.map(close, state.ema, states[step + 1].ema)


@pytest.mark.parametrize('name', WEIGHT)
def test_save_and_restore_round_trip(name, trained, tmp_path):
  run, states, _ = trained(name, sparsity_for(name))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(states[-1], run.data.train_iterator(0))
  template = run.program.init(1, run.target)
  restored = checkpoints.restore(template)
  checkpoints.close()
  # The run's key is not stored: it follows from the seed, which the template has.
  want = states[-1].replace(key=template.key)
  assert jax.tree.structure(restored) == jax.tree.structure(want)
  jax.tree.map(assert_array_equal, restored, want)
