"""A workdir loaded as a plain object against the run that wrote it."""

import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.version import VERSION
from sparse_lm.data import tokenizers
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.runs.workdir import Workdir, read_json, write_json

STE = {'weight__name': 'magnitude', 'weight__apply': 'straight_through', 'weight__start': 0.0}
STE |= {'weight__schedule': 'at_once'}


@pytest.fixture(scope='module', params=[{'weight__name': 'static'}, STE], ids=['static', 'ste'])
def run(request, tiny_config, tmp_path_factory):
  """A finished run with averaged parameters: its config, workdir and result."""
  fields = request.param | {
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


def test_logits_equal_those_of_the_training_program(run, trained, state):
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
  loss = evaluate(prepared, trained.params, trained.model_state)['val_loss']
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


def test_the_tokenizer_is_that_of_the_run(trained, text_file):
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


def changed_copy(workdir, tmp_path, name, change):
  """A copy whose file `name` holds other values, with the digest that belongs to them."""
  copy = pathlib.Path(shutil.copytree(workdir, tmp_path / 'copy'))
  values = read_json(copy / name)
  change(values)
  write_json(copy / name, values)
  return copy


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
def test_a_flipped_bit_is_refused(name, run, tmp_path):
  copy = pathlib.Path(shutil.copytree(run[1], tmp_path / 'copy'))
  data = bytearray((copy / name).read_bytes())
  data[len(data) // 2] ^= 1
  (copy / name).write_bytes(data)
  with pytest.raises(UserError, match=rf'{name} (is damaged|has no)'):
    load(str(copy))


def test_files_of_another_run_are_refused(run, tmp_path):
  """They are intact, fit the weights' shapes and would give other logits."""

  def other_config(values):
    values['model']['norm'] = 'layernorm'

  def other_tokenizer(values):
    values['chars'] = values['chars'].replace('z', '~')

  for name, change in (('config.json', other_config), ('tokenizer.json', other_tokenizer)):
    copy = changed_copy(run[1], tmp_path / name, name, change)
    with pytest.raises(UserError, match=rf'it was saved with another {name}'):
      load(str(copy))


@pytest.mark.parametrize('format_', [None, 1, 4])
def test_a_config_of_another_format_is_refused_by_its_number(format_, run, tmp_path):
  """What an older version wrote has none: the first format had no number."""

  def other(values):
    del values['written_by']
    if format_ is None:
      del values['format']
    else:
      values['format'] = format_

  copy = changed_copy(run[1], tmp_path, 'config.json', other)
  config = run[0]
  for attempt in (
    lambda: load(str(copy)),
    lambda: Workdir(str(copy), config, setup(config).data),
    lambda: load(str(copy / 'best')),
  ):
    with pytest.raises(UserError) as refused:
      attempt()
    line = str(refused.value)
    writer = 'a later version' if format_ == 4 else 'sparse_lm 0.1'
    assert f'config.json was written by {writer} (format {format_ or 1})' in line
    assert f'this is sparse_lm {VERSION}, which reads format 3' in line
    assert '\n' not in line


def test_another_version_that_writes_this_format_continues_a_run(run, tmp_path):
  assert read_json(run[1] / 'config.json')['written_by'] == VERSION
  config = run[0]
  for place, change in (
    ('later', lambda v: v.update(written_by='0.3.0')),
    ('unnamed', lambda v: v.pop('written_by')),
  ):
    copy = changed_copy(run[1], tmp_path / place, 'config.json', change)
    assert load(str(copy)).step == load(str(run[1])).step
    Workdir(str(copy), config, setup(config).data)


def test_a_run_with_more_steps_still_loads(run, trained, tmp_path):
  copy = changed_copy(run[1], tmp_path, 'config.json', lambda v: v['train'].update(steps=9))
  assert load(str(copy)).step == trained.step


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'data.json', 'result.json'])
@pytest.mark.parametrize('text', [b'[1, 2]', b'{}', b'{"a": ', b'[' * 10_000, b'\xff', b''])
def test_a_file_with_other_contents_is_refused_in_one_line(name, text, run, tmp_path):
  copy = pathlib.Path(shutil.copytree(run[1], tmp_path / 'copy'))
  (copy / name).write_bytes(text)
  with pytest.raises(UserError) as refused:
    Workdir(str(copy), run[0], setup(run[0]).data).result(8)
  assert f'{name} ' in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize(
  ('saved', 'said'),
  [
    ({}, "has no 'name'"),
    ({'name': 'words'}, "unknown tokenizer 'words'"),
    ({'name': 'chars'}, "has no 'chars'"),
    ({'name': 'chars', 'chars': 5}, 'chars is 5 and not a string'),
    ({'name': 'chars', 'chars': 'ba'}, 'not sorted'),
    ({'name': 'chars', 'chars': '\ud800'}, 'surrogates not allowed'),
    ({'name': 'chars', 'chars': ''}, '0 different characters'),
    ({'name': 'bpe', 'merges': 'a b c'}, "merge 1 is 'a b c'"),
    ({'name': 'bpe', 'merges': 'a b\nabc d'}, "merge 2 is 'abc d'"),
    ({'name': 'bpe', 'merges': 'a b\n' * 70_000}, '70000 merges, more than'),
  ],
)
def test_a_tokenizer_that_training_never_saves_is_one_line(saved, said):
  with pytest.raises(UserError) as refused:
    tokenizers.from_json(saved)
  assert said in str(refused.value) and '\n' not in str(refused.value)


def test_the_result_of_another_run_is_refused(run, tmp_path):
  def other_run(values):
    values['config']['seed'] += 1

  def no_steps(values):
    del values['metrics']['steps']

  for change, said in ((other_run, 'a run with another config'), (no_steps, "has no 'steps'")):
    copy = changed_copy(run[1], tmp_path / change.__name__, 'result.json', change)
    with pytest.raises(UserError, match=said):
      train(run[0], str(copy), progress=False)
  copy = shutil.copytree(run[1], tmp_path / 'flipped')
  text = (copy / 'result.json').read_text()
  digit = re.search(r'"val_loss": \d\.(\d)', text).start(1)
  (copy / 'result.json').write_text(f'{text[:digit]}{9 - int(text[digit])}{text[digit + 1 :]}')
  with pytest.raises(UserError, match=r'result\.json is damaged \(it was changed'):
    train(run[0], str(copy), progress=False)


@pytest.mark.parametrize(
  ('tokens', 'said'),
  [
    (np.zeros(4, np.int32), r'shape \(4,\) and type int32; valid: .*\[sequences, tokens\]'),
    (np.zeros((1, 2, 3), np.int32), r'shape \(1, 2, 3\)'),
    (np.zeros((1, 4)), 'type float64'),
    ([[1, 2]], 'type list'),
    (np.zeros((1, 17), np.int32), r'a sequence has 17 tokens; valid: 1 to 16'),
    (np.zeros((1, 0), np.int32), r'a sequence has 0 tokens'),
    (np.full((1, 4), 999), r'from 999 to 999; valid: 0 to'),
    (np.full((1, 4), -1), r'from -1 to -1'),
  ],
)
def test_logits_of_other_arrays_are_refused(tokens, said, trained):
  with pytest.raises(UserError, match=said):
    trained.logits(tokens)


def test_text_goes_into_logits_directly(trained):
  assert trained.logits(trained.tokenizer.encode('the cat')[None]).shape[:2] == (1, 7)


def test_a_loaded_run_is_shown_in_one_short_line(run, trained):
  count = sum(w.size for w in jax.tree.leaves(trained.params))
  shown = f'Trained({str(run[1])!r}, step 8, {count:,} parameters, {trained.tokenizer!r})'
  assert repr(trained) == shown
  data = setup(run[0]).data
  assert len(repr(data)) < 200 and repr(data).startswith('Data(files, tokens of chars: train ')


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
