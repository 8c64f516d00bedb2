"""Checkpoints and the file system: folders of any name, a full disk, a bit that flips in one array."""

import pathlib
import resource
import signal

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.setup import setup

BIG = 1000  # bytes: arrays and their descriptions, not the markers of a finished write


@pytest.fixture(scope='module')
def config(tiny_config):
  return tiny_config(weight__name='static', weight__sparsity=0.8, optimizer__ema=0.9)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x01
  path.write_bytes(content)


NAMES = (
  'w[a]',
  'w[!a-z]',
  'a\\b',
  'w*',
  'w?',
  '{a,b}',
  'a b',
  'ü雪',
  '~',
  '%41',
  'gs:w',
  '-w',
  "a'b",
)


@pytest.mark.parametrize(
  'name', [*NAMES[:4], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[4:])]
)
def test_a_folder_of_any_name_holds_checkpoints(name, config, tmp_path, monkeypatch):
  run = setup(config)
  state = run.program.init(0, run.target)
  # A pattern would match this one too, and would take the other's arrays.
  for other in ('wa', 'w', 'ab', 'a'):
    (tmp_path / other).mkdir()
  monkeypatch.chdir(tmp_path)
  for _ in range(2):  # written once, then read by another
    checkpoints = Checkpoints(pathlib.Path(name))
    checkpoints.save(state, run.data.train_iterator(0))
    restored = checkpoints.restore(jax.eval_shape(lambda: state))
    checkpoints.close()
    jax.tree.map(assert_array_equal, restored.trainable, state.trainable)
  assert sorted(path.name for path in (tmp_path / name / 'checkpoints').iterdir()) == ['0']
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['wa', 'w', 'ab', 'a', name])


def test_a_first_checkpoint_that_cannot_be_read_back_is_refused(config, tmp_path, monkeypatch):
  run = setup(config)
  state = run.program.init(0, run.target)
  checkpoints = Checkpoints(tmp_path)
  read = Checkpoints._read

  def damaged(self, step, *arguments, **named):
    for path in (tmp_path / 'checkpoints' / str(step) / 'params').rglob('*'):
      if path.is_file() and path.stat().st_size > BIG:
        flip(path)
    return read(self, step, *arguments, **named)

  monkeypatch.setattr(Checkpoints, '_read', damaged)
  with pytest.raises(UserError, match=r'checkpoint 0 .* cannot be read after it was written'):
    checkpoints.save(state, run.data.train_iterator(0))
  assert checkpoints.steps() == [] and (tmp_path / 'corrupt-0').is_dir()
  checkpoints.close()


def test_a_full_disk_is_one_line_and_keeps_the_older_checkpoint(config, tmp_path, capfd):
  """A limit on the size of a file stands for a full disk, with another number of the error."""
  run = setup(config)
  state = run.program.init(0, run.target)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state, run.data.train_iterator(0))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    with pytest.raises(UserError) as refused:
      checkpoints.save(state.replace(step=state.step + 1), run.data.train_iterator(0))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)
  checkpoints.close()
  line = str(refused.value)
  assert 'checkpoint 1' in line and 'cannot be written' in line and '\n' not in line
  assert capfd.readouterr().err == ''
  again = Checkpoints(tmp_path)
  assert int(again.restore(state).step) == 0 and again.steps() == [0]
  again.close()


def test_a_flipped_bit_hits_the_leaf_that_it_is_in_and_no_other(config, tmp_path):
  """Of two leaves that storage cannot compress, so that their bytes are found in its files."""
  draw = np.random.default_rng(0)
  leaves = {name: draw.integers(0, 256, 2**20).astype(np.uint8) for name in ('a', 'b')}
  run = setup(config)
  state = run.program.init(0, run.target).replace(model_state=leaves)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state)
  part = leaves['b'][1000:1032].tobytes()
  (file,) = (f for f in tmp_path.rglob('*') if f.is_file() and part in f.read_bytes())
  content = bytearray(file.read_bytes())
  content[content.index(part)] ^= 1
  file.write_bytes(content)
  found = checkpoints.restore_leaves(0, 'model', {'a': leaves['a']})
  assert_array_equal(found['a'], leaves['a'])
  with pytest.raises(UserError, match=r'checkpoint 0 in .* is damaged \(.*\bb\b'):
    checkpoints.restore_leaves(0, 'model', {'b': leaves['b']})
  checkpoints.close()
