"""Calibrated thresholds of activations (TEAL, CATS) against NumPy, for runs and imported models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm import prune as command
from sparse_lm.convert.upcycling import Upcycling, upcycle
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.layers.threshold import THRESHOLDS
from sparse_lm.plan import sites
from sparse_lm.prune import prune
from sparse_lm.runs.calibrate import calibrate
from sparse_lm.runs.loop import train
from sparse_lm.runs.run_folder import WEIGHTS
from sparse_lm.runs.setup import data_of, setup
from sparse_lm.runs.trained import load
from sparse_lm.runs.weight_files import STATE
from sparse_lm.train import layerwise, states, thresholds
from sparse_lm.train.layerwise import InMemory

SPARSITY, SEGMENTS, CONTEXT = 0.4, 24, 16
TEAL = {'site.name': 'teal', 'site.density': 1 - SPARSITY}
CATS = {'activation.name': 'cats', 'activation.density': 1 - SPARSITY}
GATED = {'mlp__name': 'gated', 'activation__name': 'silu', 'model__layers': 2}
MATRICES = [f'attention/{name}' for name in ('query', 'key', 'value', 'out')]
MATRICES += [f'mlp/{name}' for name in ('gate', 'up', 'down')]
PATHS = {
  'teal': {f'block_{i}/{name}/input' for i in range(2) for name in MATRICES},
  'cats': {f'block_{i}/mlp/activation/value' for i in range(2)},
}
WANTED = {'teal': TEAL, 'cats': CATS}
BOTH = pytest.mark.parametrize('name', ['teal', 'cats'])


@pytest.fixture(scope='module')
def trained(tiny_config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  train(tiny_config(train__steps=4, model__init='gpt2', **GATED), str(workdir), progress=False)
  return load(str(workdir))


@pytest.fixture(scope='module')
def calibrated(trained, tmp_path_factory):
  """The workdir, the loaded model and the calibration tokens of each method."""
  found = {}
  for name, fields in WANTED.items():
    out = tmp_path_factory.mktemp(name) / 'child'
    calibrate(trained.workdir, str(out), fields, SEGMENTS, CONTEXT)
    found[name] = load(str(out))
  return found


@pytest.fixture(scope='module')
def tokens(trained):
  text = data_of(trained.config).tokens['train']
  return layerwise.calibration(text, SEGMENTS, CONTEXT, trained.config.seed)


def zeros(magnitudes, threshold):
  return float(np.mean(np.asarray(magnitudes) < threshold))


@BOTH
def test_the_fraction_of_zeros_on_the_calibration_text_is_the_sparsity(name, calibrated, tokens):
  run = calibrated[name]
  found = tree.named(run.model_state[THRESHOLDS])
  assert found.keys() == PATHS[name]
  # The paths of CATS are those of the values before the threshold.
  read = list(found) if name == 'teal' else [f'block_{i}/mlp/activation/value' for i in range(2)]
  variables = {'params': run.params, **run.model_state}
  _, seen = sites.run(run.program.model, variables, tokens, read=read)
  for path in read:
    x = np.abs(np.asarray(seen[path]))
    count = np.mean(x == 0) if name == 'teal' else zeros(x, float(found[path]))
    assert count == pytest.approx(SPARSITY, abs=1e-3), path
  assert (run.logits(tokens) != run.program.model.apply({**variables, **_zero(run)}, tokens)).any()


def _zero(run):
  return {THRESHOLDS: jax.tree.map(jnp.zeros_like, run.model_state[THRESHOLDS])}


@BOTH
def test_thresholds_of_zero_equal_the_dense_model_bit_for_bit(name, trained, calibrated, tokens):
  run = calibrated[name]
  variables = {'params': run.params, **_zero(run)}
  for mode in ('train', 'eval'):
    apply = jax.jit(lambda model, v, t, mode: model.apply(v, t, mode=mode), static_argnums=(0, 3))
    dense = apply(trained.program.model, {'params': trained.params}, tokens, mode)
    assert_array_equal(apply(run.program.model, variables, tokens, mode), dense)
  zeroed = thresholds.calibrate(
    run.program.model.clone(**_at_zero(run.program.model)),
    InMemory(run.params, run.masks),
    run.model_state,
    [tokens],
  )
  assert not any(float(t) for t in jax.tree.leaves(zeroed[THRESHOLDS]))


def _at_zero(model):
  off = lambda own: dataclasses.replace(  # noqa: E731
    own, fields=tuple((k, 1.0 if k == 'density' else v) for k, v in own.fields)
  )
  rules = {s: tuple((where, off(own)) for where, own in s.rules) for s in model.slots}
  slots = tuple(dataclasses.replace(s, rules=rules[s]) for s in model.slots)
  return {'slots': slots, 'site': off(model.site)}


def rms(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def silu(x):
  return x / (1 + np.exp(-x))


@BOTH
def test_mlp_equals_numpy(name, calibrated, tokens):
  run = calibrated[name]
  variables = {'params': run.params, **run.model_state}
  read = ['block_1/mlp/input', 'block_1/mlp/output']
  other = tokens[:, ::-1]  # on calibration text, one activation of each site equals the threshold
  _, seen = sites.run(run.program.model, variables, other, read=read)
  x, want = (np.asarray(seen[path], np.float64) for path in read)
  mlp = run.params['block_1']['mlp']
  kernel = {part: np.asarray(mlp[part]['kernel'], np.float64) for part in ('gate', 'up', 'down')}
  found = {path: float(t) for path, t in tree.named(run.model_state[THRESHOLDS]).items()}

  def cut(values, path):
    return np.where(np.abs(values) < found.get(f'block_1/mlp/{path}', 0.0), 0, values)

  gate = cut(silu(cut(x, 'gate/input') @ kernel['gate']), 'activation/value')
  h = gate * (cut(x, 'up/input') @ kernel['up'])
  assert_allclose(cut(h, 'down/input') @ kernel['down'], want, rtol=1e-4, atol=1e-5)


def test_threshold_is_the_quantile_of_a_sort():
  x = np.abs(np.random.default_rng(0).normal(size=10_000)).astype('f')
  for sparsity in (0.1, 0.5, 0.99):
    assert thresholds.threshold(x, 1 - sparsity) == np.sort(x)[round(sparsity * x.size)]
    assert zeros(x, thresholds.threshold(x, 1 - sparsity)) == pytest.approx(sparsity, abs=1e-4)
  assert thresholds.threshold(x, 1.0) == 0


@pytest.fixture
def imported(trained, without_text, tmp_path):
  """The same model as a workdir with weight files and no text, as convert writes it."""
  return without_text(trained, tmp_path / 'imported')


def test_weight_files_get_the_same_thresholds(imported, calibrated, text_file, tmp_path):
  out = tmp_path / 'out'
  given = TEAL | {'data.path': str(text_file)}
  result = calibrate(str(imported), str(out), given, SEGMENTS, CONTEXT)
  assert result['calibrated_from'] == 'a test' and result['config']['site']['name'] == 'teal'
  run = load(str(out))
  want = tree.named(calibrated['teal'].model_state)
  for path, value in tree.named(run.model_state).items():
    assert_allclose(value, want[path], rtol=1e-4)
  jax.tree.map(assert_array_equal, run.params, load(str(imported)).params)
  with pytest.raises(UserError, match='holds calibrated thresholds'):
    prune(str(out), str(tmp_path / 'more'), {'weight.name': 'magnitude', 'weight.sparsity': 0.5})
  path = out / WEIGHTS / STATE
  path.write_bytes(path.read_bytes()[:-2] + b'\x00\x01')
  with pytest.raises(UserError, match=r'state\.safetensors is damaged'):
    load(str(out))


@BOTH
def test_a_run_with_thresholds_is_not_upcycled(name, calibrated, tmp_path):
  with pytest.raises(UserError, match='also holds the collections thresholds; valid: '):
    upcycle(calibrated[name].workdir, str(tmp_path / 'out'), Upcycling(3, 2))
  assert not list(tmp_path.iterdir())


@BOTH
def test_a_run_with_thresholds_is_not_pruned(name, calibrated, tmp_path):
  fields = {'weight.name': 'magnitude', 'weight.sparsity': 0.5}
  with pytest.raises(UserError, match='holds calibrated thresholds'):
    prune(calibrated[name].workdir, str(tmp_path / 'out'), fields, 1)
  assert not list(tmp_path.iterdir())


@BOTH
def test_a_model_without_the_thresholds_of_its_parent_is_refused(name, calibrated, tiny_config):
  parent = calibrated[name].workdir
  with pytest.raises(
    UserError, match=r'config\.init_from=.* holds calibrated thresholds'
  ) as refused:
    setup(tiny_config(init_from=parent, **GATED))
  assert '\n' not in str(refused.value) and f"'{name}'" in str(refused.value)


def test_thresholds_are_kept_by_a_run_with_another_kind_of_router(tiny_config):
  fields = {'site__name': 'teal', 'site__where': ('*/attention/*/input',)}
  one = setup(tiny_config(mlp__name='moe_topk', **fields))
  two = setup(tiny_config(mlp__name='moe_balanced', mlp__shared=0, **fields))
  theirs, fresh = one.start(), two.start()
  assert fresh.model_state.keys() > theirs.model_state.keys() == {THRESHOLDS}
  calibrated = jax.tree.map(lambda t: t + 0.25, theirs.model_state)
  start = states.Start(theirs.trainable['params'], None, calibrated)
  found = states.restart(two.program.method, two.program.optimizer, 0, fresh, start).model_state
  want = fresh.model_state | calibrated
  jax.tree.map(assert_array_equal, found, want)


def test_a_run_of_the_same_model_starts_with_the_thresholds_of_its_parent(calibrated, tiny_config):
  run = calibrated['teal']
  config = tiny_config(init_from=run.workdir, site__name='teal', **GATED)
  jax.tree.map(assert_array_equal, setup(config).start().model_state, run.model_state)


def test_upcycling_refuses_weight_files_with_thresholds(imported, text_file, tmp_path):
  calibrate(str(imported), str(tmp_path / 'teal'), TEAL | {'data.path': str(text_file)}, 1, 8)
  with pytest.raises(UserError, match='also holds the collections thresholds'):
    upcycle(str(tmp_path / 'teal'), str(tmp_path / 'out'), Upcycling(3, 2))
  assert not (tmp_path / 'out').exists()


def test_cats_keeps_the_fields_of_the_activation_that_it_wraps(tiny_config, tmp_path):
  fields = GATED | {'activation__name': 'gelu', 'activation__approximate': True}
  train(tiny_config(train__steps=1, **fields), str(tmp_path / 'run'), progress=False)
  calibrate(str(tmp_path / 'run'), str(tmp_path / 'out'), CATS, 1, 8)
  inner = load(str(tmp_path / 'out')).config.activation.inner
  assert (inner.name, inner.approximate) == ('gelu', True)


def test_command_prints_one_line_and_refuses_a_method_without_thresholds(trained, call, tmp_path):
  out = str(tmp_path / 'out')
  given = ['--workdir', trained.workdir, '--out', out, '--segments', '4']
  code, said, _ = call(command, [*given, '--config.site.name=teal'])
  assert not code and 'thresholds calibrated in' in said and 'validation loss' in said
  code, _, said = call(command, [*given[:2], '--out', out + '2', '--config.site.name=abs_topk'])
  assert code == 2 and 'have no thresholds to calibrate' in said
