"""A workdir loaded as a plain object against the run that wrote it."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.evaluate import evaluate
from sparse_lm.train.loop import train
from sparse_lm.train.setup import setup
from sparse_lm.train.trained import load


@pytest.fixture(scope='module', params=['static', 'ste'])
def run(request, tiny_config, tmp_path_factory):
  """A finished run with averaged parameters: its config, workdir and result."""
  fields = {
    'weight__name': request.param,
    'weight__sparsity': 0.8,
    'weight__dense': ('embed', 'norm', 'head', 'attention'),
    'optimizer__ema': 0.5,
    'train__steps': 8,
  }
  config = tiny_config(**fields)
  workdir = tmp_path_factory.mktemp('run')
  return config, workdir, train(config, str(workdir), progress=False)


@pytest.fixture(scope='module')
def trained(run):
  return load(str(run[1]))


@pytest.fixture(scope='module')
def state(run):
  """The last state, optimizer and all, as training would continue from it."""
  config, workdir, _ = run
  prepared = setup(config)
  batches = prepared.data.train_iterator(rng.data_seed(config.seed))
  checkpoints = Checkpoints(workdir)
  restored = checkpoints.restore(prepared.program.init(0, prepared.target), batches)
  checkpoints.close()
  return restored


def test_logits_are_the_training_programs(run, trained, state):
  config, _, result = run
  prepared = setup(config)
  params, masks = prepared.program.finalize(state)
  tokens = np.random.default_rng(0).integers(prepared.data.tokenizer.vocab_size, size=(3, 16))
  tokens = tokens.astype(np.int32)
  want = prepared.program.model.apply({'params': params}, tokens, mode='eval')
  assert_allclose(trained.logits(tokens), want, rtol=1e-5, atol=1e-5)
  assert np.abs(want).max() > 1e-2, 'a head that is still zero would agree with anything'
  jax.tree.map(assert_array_equal, trained.params, params)
  jax.tree.map(assert_array_equal, trained.masks, masks)
  # The average, not the last weights, is what evaluation reported.
  assert not np.array_equal(
    trained.params['embed']['tokens'], state.trainable['params']['embed']['tokens']
  )
  assert trained.step == 8
  loss, _ = evaluate(prepared, trained.params, trained.model_state)
  assert_allclose(loss, result['metrics']['val_loss'], rtol=1e-6)


def test_dropped_weights_are_exact_zeros(trained):
  masks, params = tree.named(trained.masks), tree.named(trained.params)
  assert len(masks) == 2
  for path, mask in masks.items():
    assert mask.dtype == bool and 0.15 < mask.mean() < 0.25
    assert not np.asarray(params[path])[~np.asarray(mask)].any()


def test_costs_equal_the_result(run, trained):
  costs, metrics = trained.costs(), run[2]['metrics']
  assert costs and {name: metrics[name] for name in costs} == costs
  nonzero = sum(int((np.asarray(w) != 0).sum()) for w in jax.tree.leaves(trained.params))
  assert costs['nonzero_params'] == nonzero
  assert costs['params'] == sum(w.size for w in jax.tree.leaves(trained.params))


def test_tokenizer_is_the_runs(trained, text_file):
  text = text_file.read_text()[:200]
  assert trained.tokenizer.decode(trained.tokenizer.encode(text.encode())) == text
  assert trained.logits(np.zeros((1, 4), np.int32)).shape == (1, 4, len(set(text_file.read_text())))


def test_loading_changes_no_file_and_needs_no_corpus(run, tmp_path, monkeypatch):
  copy = pathlib.Path(shutil.copytree(run[1], tmp_path / 'copy'))
  before = {f: f.read_bytes() for f in copy.rglob('*') if f.is_file()}
  monkeypatch.setattr('sparse_lm.data.sources.load', lambda *_: pytest.fail('read the corpus'))
  loaded = load(str(copy))
  assert loaded.step == 8
  assert {f: f.read_bytes() for f in copy.rglob('*') if f.is_file()} == before


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'holds no run'):
    load(str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
  for name in ('config.json', 'tokenizer.json'):
    (tmp_path / name).write_text((run[1] / name).read_text())
  with pytest.raises(UserError, match=r'no checkpoint yet'):
    load(str(tmp_path))
  assert {path.name for path in tmp_path.iterdir()} == {'config.json', 'tokenizer.json'}
