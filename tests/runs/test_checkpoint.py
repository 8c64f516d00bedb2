"""Damaged checkpoints: an older intact one is used, said aloud, and nothing is lost."""

import json
import pathlib
import re
import shutil
import zlib

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs import storage
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.history import History
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.train.work import Work

ITEMS = {'params', 'sparse', 'optimizer', 'model', 'history', 'data', 'meta'}
BIG = 1000  # bytes: arrays and their descriptions, not the markers of a finished write


@pytest.fixture(scope='module')
def config(tiny_config):
  return tiny_config(
    weight__name='static',
    weight__sparsity=0.8,
    optimizer__ema=0.9,
    train__steps=6,
    train__checkpoint_every=2,
  )


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  """A workdir with checkpoints 2, 4 and 6."""
  workdir = tmp_path_factory.mktemp('run')
  train(config, str(workdir), progress=False)
  return workdir


@pytest.fixture
def workdir(whole, tmp_path):
  """A copy to damage."""
  return pathlib.Path(shutil.copytree(whole, tmp_path / 'run'))


@pytest.fixture(scope='module')
def restored(config):
  """`restored(workdir)`: the state on the host without its key, the next batch of data, the history."""
  run = setup(config)
  template = run.program.init(0, run.target)

  def restore(workdir):
    batches = run.data.train_iterator(rng.data_seed(config.seed))
    history = History(run.program.finalize(template)[1], 0, Work())
    checkpoints = Checkpoints(pathlib.Path(workdir))
    try:
      state = checkpoints.restore(template, batches, history=history)
    finally:
      checkpoints.close()
    return jax.device_get(state.replace(key=None)), next(batches), history

  return restore


@pytest.fixture(scope='module')
def intact(whole, restored, tmp_path_factory):
  """What restoring gives from step 4 and from step 6."""
  older = shutil.copytree(whole, tmp_path_factory.mktemp('older') / 'run')
  shutil.rmtree(older / 'checkpoints' / '6')
  return {4: restored(older), 6: restored(whole)}


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x01
  path.write_bytes(content)


def remove(path):
  path.unlink()


def files(folder):
  return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*') if f.is_file()}


def same(a, b):
  assert int(a[0].step) == int(b[0].step)
  assert jax.tree.structure(a[0]) == jax.tree.structure(b[0])
  jax.tree.map(assert_array_equal, a[0], b[0])
  assert_array_equal(a[1], b[1])
  assert a[2].numbers() == b[2].numbers()
  jax.tree.map(assert_array_equal, a[2].masks, b[2].masks)


def test_items_are_separate(whole, intact):
  newest = whole / 'checkpoints' / '6'
  assert {path.name for path in newest.iterdir() if path.is_dir()} == ITEMS
  assert sorted(int(p.name) for p in (whole / 'checkpoints').iterdir()) == [2, 4, 6]
  # Masks are bits of their own, never inferred from zeros.
  assert all(m.dtype == bool for m in jax.tree.leaves(intact[6][0].sparse.masks))


def test_the_two_checkpoints_differ(intact):
  # Otherwise no test here could tell which one was used.
  assert intact[4][0].step == 4 and intact[6][0].step == 6
  assert not np.array_equal(intact[4][1], intact[6][1])
  assert intact[4][2].planned_steps == intact[6][2].planned_steps == 6


def rewind(path):
  """A digit of a number, in what is text: still well-formed, and wrong."""
  path.write_bytes(
    re.sub(rb'[0-9](?=\D*$)', lambda m: b'4' if m[0] == b'3' else b'3', path.read_bytes())
  )


@pytest.mark.parametrize(
  ('damage', 'first'),
  [
    (flip, 0),
    pytest.param(truncate, 1, marks=pytest.mark.slow),
    pytest.param(remove, 2, marks=pytest.mark.slow),
  ],
)
def test_one_damaged_file_never_gives_a_wrong_state(
  damage, first, workdir, restored, intact, capfd
):
  """Whatever file is hit: the newest state if it is whole for all that, or the older one, aloud."""
  newest, wrong = workdir / 'checkpoints' / '6', []
  for path in sorted(f for f in newest.rglob('*') if f.is_file())[first::2]:
    content = path.read_bytes()
    damage(path)
    damaged = files(workdir)
    capfd.readouterr()
    got = restored(workdir)
    said = capfd.readouterr().err
    step = int(got[0].step)
    name = str(path.relative_to(newest))
    try:
      same(got, intact[step])
      if step == 4:
        assert 'corrupt: checkpoint 6' in said and 'using checkpoint 4' in said
        assert 'Traceback' not in said
      assert files(workdir) == damaged, 'restoring changed files'
    except (AssertionError, KeyError) as error:
      wrong.append(f'{name} ({len(content)} bytes), step {step}: {str(error).strip()[:80]!r}')
    path.write_bytes(content)
  assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('name', ['data', 'meta'])
def test_a_wrong_number_in_a_small_file_is_noticed(name, workdir, restored, intact):
  # 6 becomes 3 in the position of the data, a digit changes in the last digest.
  (path,) = (f for f in (workdir / 'checkpoints' / '6' / name).iterdir() if f.name[0] in 'pm')
  before = path.read_bytes()
  rewind(path)
  assert path.read_bytes() != before
  got = restored(workdir)
  same(got, intact[int(got[0].step)])


@pytest.mark.parametrize('damage', [truncate, flip, remove])
@pytest.mark.parametrize('item', ['params', 'sparse', 'optimizer'])
def test_all_big_files_of_an_item_damaged(item, damage, workdir, restored, intact, capfd):
  paths = [f for f in (workdir / 'checkpoints' / '6' / item).rglob('*') if f.is_file()]
  paths = [f for f in paths if f.stat().st_size > BIG]
  assert paths
  for path in paths:
    damage(path)
  same(restored(workdir), intact[4])
  assert capfd.readouterr().err.count('checkpoint 6') == 1


@pytest.mark.parametrize('item', sorted(ITEMS))
def test_missing_item_falls_back(item, workdir, restored, intact, capfd):
  shutil.rmtree(workdir / 'checkpoints' / '6' / item)
  same(restored(workdir), intact[4])
  assert 'using checkpoint 4' in capfd.readouterr().err


def test_two_damaged_checkpoints_fall_back_to_the_third(workdir, restored, capfd):
  for step in (4, 6):
    for path in (workdir / 'checkpoints' / str(step) / 'params').rglob('*'):
      if path.is_file():
        truncate(path)
  assert int(restored(workdir)[0].step) == 2
  said = capfd.readouterr().err
  assert 'checkpoint 4' in said and 'checkpoint 6' in said and 'using checkpoint 2' in said


def test_continued_training_sets_damaged_checkpoints_aside(
  config, whole, workdir, restored, intact
):
  newest = workdir / 'checkpoints' / '6'
  for path in (newest / 'params').rglob('*'):
    if path.is_file() and path.stat().st_size > BIG:
      flip(path)
  damaged = files(newest)
  (workdir / 'result.json').unlink()
  result = train(config, str(workdir), progress=False)
  assert files(workdir / 'corrupt-6') == damaged
  want = json.loads((whole / 'result.json').read_text())['metrics']
  assert result['metrics']['val_loss'] == want['val_loss']
  same(restored(workdir), intact[6])


def test_a_workdir_of_damaged_checkpoints_is_refused_and_unchanged(config, workdir, restored):
  for path in (workdir / 'checkpoints').rglob('*'):
    if path.is_file() and path.stat().st_size > BIG:
      flip(path)
  (workdir / 'result.json').unlink()
  before = files(workdir)
  with pytest.raises(UserError) as refused:
    restored(workdir)
  with pytest.raises(UserError):
    train(config, str(workdir), progress=False)
  line = str(refused.value)
  assert 'no intact checkpoint' in line and '\n' not in line
  assert all(f'checkpoint {step} (' in line for step in (2, 4, 6))
  left_out = {pathlib.Path('env.json')}  # of the process that tried
  after = files(workdir)
  assert {k: v for k, v in after.items() if k not in left_out} == {
    k: v for k, v in before.items() if k not in left_out
  }


def test_restore_returns_none_without_a_checkpoint(config, tmp_path):
  run = setup(config)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.restore(run.program.init(0, run.target)) is None
  checkpoints.close()


def test_parameters_load_without_the_optimizer(workdir, whole):
  for step in (2, 4, 6):
    shutil.rmtree(workdir / 'checkpoints' / str(step) / 'optimizer')
    shutil.rmtree(workdir / 'checkpoints' / str(step) / 'data')
  trained, want = load(str(workdir)), load(str(whole))
  assert trained.step == want.step == 6
  jax.tree.map(assert_array_equal, trained.params, want.params)
  jax.tree.map(assert_array_equal, trained.masks, want.masks)


def meta_of(step_folder):
  """The file that holds a checkpoint's meta, and its contents."""
  (path,) = (f for f in (step_folder / 'meta').iterdir() if f.name.startswith('meta'))
  return path, json.loads(path.read_text())


def test_every_leaf_has_its_digest(whole, intact):
  _, meta = meta_of(whole / 'checkpoints' / '6')
  state = intact[6][0]
  params = {'trainable': state.trainable, 'ema': state.ema}
  for item, saved in (('params', params), ('sparse', state.sparse)):
    leaves = tree.named(saved)
    assert len(leaves) > 3 and meta['leaves'][item].keys() == {*leaves, 'schema'}
    for path, leaf in leaves.items():
      want = zlib.crc32(path.encode() + np.asarray(leaf).tobytes())
      assert meta['leaves'][item][path] == want


@pytest.fixture
def opened(workdir):
  """The checkpoints of the copy."""
  checkpoints = Checkpoints(workdir)
  yield checkpoints
  checkpoints.close()


BLOCK = 'trainable/params/block_0/'


def test_one_block_is_restored_alone(opened, intact, monkeypatch):
  params = intact[6][0].trainable['params']
  template = {'trainable': {'params': {'block_0': jax.eval_shape(lambda: params['block_0'])}}}
  asked = []
  reading = storage.reading
  monkeypatch.setattr(storage, 'reading', lambda leaves: asked.extend(leaves) or reading(leaves))
  found = opened.restore_leaves(6, 'params', template)
  assert jax.tree.structure(found) == jax.tree.structure(template)
  jax.tree.map(assert_array_equal, found['trainable']['params']['block_0'], params['block_0'])
  assert len(asked) > 1 and all(path.startswith(BLOCK) for path in asked)


def test_a_damaged_leaf_is_named_and_the_others_can_be_read(
  opened, workdir, restored, intact, capfd
):
  path, meta = meta_of(workdir / 'checkpoints' / '6')
  leaf = 'trainable/params/embed/tokens'
  meta['leaves']['params'][leaf] += 1
  path.write_text(json.dumps(meta))
  params = intact[6][0].trainable['params']
  for name in ('block_0', 'norm'):
    template = {'trainable': {'params': {name: params[name]}}}
    found = opened.restore_leaves(6, 'params', template)
    jax.tree.map(assert_array_equal, found, template)
  with pytest.raises(UserError) as refused:
    opened.restore_leaves(6, 'params', {'trainable': {'params': {'embed': params['embed']}}})
  line = str(refused.value)
  assert 'checkpoint 6' in line and f'the bytes of {leaf} of' in line and '\n' not in line
  same(restored(workdir), intact[4])
  assert leaf in capfd.readouterr().err


def test_a_leaf_that_was_not_saved_is_named_with_the_nearest(opened):
  template = {'trainable': {'params': {'block_0': {'mlp': {'upp': {'kernel': np.zeros(1)}}}}}}
  with pytest.raises(UserError, match=r"'trainable/params/block_0/mlp/upp/kernel': did you mean"):
    opened.restore_leaves(6, 'params', template)


def test_a_checkpoint_of_another_version_is_refused_by_its_number(workdir, restored):
  for step in (2, 4, 6):
    path, meta = meta_of(workdir / 'checkpoints' / str(step))
    del meta['written_by']  # which the version of that schema did not write
    path.write_text(json.dumps(meta | {'schema': 3}))
  with pytest.raises(
    UserError,
    match=r'it was written by sparse_lm 0\.1 \(format 3\); this is sparse_lm .*, which reads format 4',
  ):
    restored(workdir)
