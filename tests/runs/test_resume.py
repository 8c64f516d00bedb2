"""A run that was stopped and continued is the run that was not."""

import json
import pathlib
import shutil
import struct

import jax
import pytest
from numpy.testing import assert_array_equal
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sparse_lm.core import rng
from sparse_lm.core.errors import UserError
from sparse_lm.runs import setup as setups
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.loop import _Loop, train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.runs.workdir import FREE, read_json
from sparse_lm.train.step import Program

STEPS, CUT = 20, 10


@pytest.fixture(scope='module')
def rigl(tiny_config):
  """Updates at 3, 6, 9 and 12: on both sides of the cut. Dropout draws from the run's own key."""
  return tiny_config(
    weight__name='rigl',
    weight__sparsity=0.8,
    weight__period=3,
    weight__dense=('embed', 'norm', 'head', 'attention'),
    model__dropout=0.1,
    optimizer__ema=0.9,
    train__steps=STEPS,
    train__checkpoint_every=7,
    train__eval_every=5,
  )


@pytest.fixture(scope='module')
def whole(rigl, tmp_path_factory):
  """The workdir of a run without interruption, and its result."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, train(rigl, str(workdir), progress=False)


@pytest.fixture
def finished(whole, tmp_path):
  """A copy that a test may spoil."""
  return pathlib.Path(shutil.copytree(whole[0], tmp_path / 'copy'))


def last_state(config, workdir):
  """The newest checkpoint's state on the host, and the two batches that would have come next."""
  run = setup(config)
  batches = run.data.train_iterator(rng.data_seed(config.seed))
  checkpoints = Checkpoints(pathlib.Path(workdir))
  state = checkpoints.restore(run.program.init(0, run.target), batches)
  checkpoints.close()
  return jax.device_get(state.replace(key=None)), [next(batches), next(batches)]


def metrics(workdir):
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def comparable(lines):
  """Without times."""
  return [{k: v for k, v in line.items() if k != 'tokens_per_second'} for line in lines]


class Killed(Exception):
  """What stops a run without a chance to save."""


@pytest.fixture
def kill_at(monkeypatch):
  """`kill_at(config, workdir, step)` trains until the run dies after that step, unsaved."""
  compiled = Program.step

  def run(config, workdir, cut):
    def kill(program, step):
      if step == cut:
        raise Killed
      return compiled(program, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
      patch.setattr(Program, 'step', kill)
      train(config, str(workdir), progress=False)

  return run


@pytest.mark.parametrize('how', ['signal', 'kill'])
def test_continued_run_is_bit_exact(how, rigl, whole, tmp_path, train_until, kill_at):
  if how == 'signal':
    train_until(rigl, tmp_path, CUT)
    assert last_state(rigl, tmp_path)[0].step == CUT
  else:  # the last checkpoint is of step 7, and steps 8 to 10 are done again
    kill_at(rigl, tmp_path, CUT)
    assert last_state(rigl, tmp_path)[0].step == 7
    assert metrics(tmp_path)[-1]['step'] == CUT
    with (tmp_path / 'metrics.jsonl').open('a') as file:
      file.write('{"step": 11, "lo')  # it was writing a line
  result = train(rigl, str(tmp_path), progress=False)

  workdir, want = whole
  state, batches = last_state(rigl, tmp_path)
  other, other_batches = last_state(rigl, workdir)
  assert int(state.step) == STEPS
  assert jax.tree.structure(state) == jax.tree.structure(other)
  jax.tree.map(assert_array_equal, state, other)
  assert_array_equal(batches, other_batches)
  assert timeless(result) == timeless(want)
  # Each step once, with the same numbers.
  assert comparable(metrics(tmp_path)) == comparable(metrics(workdir))
  logged = [line['step'] for line in metrics(tmp_path) if 'loss' in line]
  assert logged == list(range(1, STEPS + 1))
  assert [line['step'] for line in metrics(tmp_path) if 'val_loss' in line] == [5, 10, 15, 20]


# Before the first checkpoint, between two, on one that is no line of the log, on a line of the log, at
# an evaluation, and at the end; the log has lines at 4, 8, ... and evaluations at 5, 10, ...
@pytest.mark.parametrize(
  ('how', 'cut'),
  [('kill', 3), ('kill', 9), ('signal', 6), ('signal', 8), ('kill', 16), ('signal', 20)],
)
def test_the_log_of_a_stopped_run_is_that_of_an_undisturbed_one(
  how, cut, sparse_log, tmp_path, stop_at
):
  config, workdir = sparse_log
  stop_at(how, config, tmp_path, cut)
  result = train(config, str(tmp_path), progress=False)
  assert comparable(metrics(tmp_path)) == comparable(metrics(workdir))
  want = json.loads((workdir / 'result.json').read_text())
  assert timeless(result) == timeless(want)
  for name in ('checkpoints', 'best'):
    assert saved_steps(tmp_path, name)[-1:] == saved_steps(workdir, name)[-1:]
  assert curves(tmp_path) == curves(workdir)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['kill', 'signal'])
def test_the_log_is_the_same_wherever_the_run_was_stopped(how, sparse_log, tmp_path, stop_at):
  config, workdir = sparse_log
  for cut in range(1, STEPS):
    stop_at(how, config, tmp_path / str(cut), cut)
    train(config, str(tmp_path / str(cut)), progress=False)
    assert comparable(metrics(tmp_path / str(cut))) == comparable(metrics(workdir)), cut
    assert curves(tmp_path / str(cut)) == curves(workdir), cut


def timeless(result):
  return {k: v for k, v in result['metrics'].items() if k != 'train_step_ms'}


def saved_steps(workdir, name):
  return sorted(int(p.name) for p in (workdir / name).iterdir() if p.name.isdigit())


def curves(workdir):
  """What TensorBoard shows, times apart: a START event hides what older files hold from its step on."""
  shown = []
  for file in sorted((workdir / 'events').iterdir()):
    data, position = file.read_bytes(), 0
    while position < len(data):
      (length,) = struct.unpack('<Q', data[position : position + 8])
      event = Event.FromString(data[position + 12 : position + 12 + length])
      position += length + 16
      if event.session_log.status == SessionLog.START:
        shown = [point for point in shown if point[0] < event.step]
      for value in event.summary.value:
        if value.tag != 'tokens_per_second':
          shown.append((event.step, value.tag, value.simple_value))
  assert len({point[:2] for point in shown}) == len(shown) > 0
  return shown


@pytest.fixture(scope='module')
def sparse_log(rigl, tmp_path_factory):
  """The same run with fewer lines in its log: their losses are means over several steps."""
  config = rigl.copy_and_resolve_references()
  config.train.log_every = 4
  workdir = tmp_path_factory.mktemp('sparse_log')
  train(config, str(workdir), progress=False)
  return config, workdir


@pytest.fixture
def stop_at(train_until, kill_at):
  def stop(how, config, workdir, cut):
    {'signal': train_until, 'kill': kill_at}[how](config, workdir, cut)

  return stop


def test_the_logged_loss_is_the_mean_over_its_steps(sparse_log, whole):
  each = {line['step']: line['loss'] for line in metrics(whole[0]) if 'loss' in line}
  for line in metrics(sparse_log[1]):
    if 'loss' in line:
      step = line['step']
      assert line['loss'] == pytest.approx(sum(each[s] for s in range(step - 3, step + 1)) / 4)


def test_masks_moved_on_both_sides_of_the_cut(rigl, whole):
  # Otherwise the test above would compare masks that nothing had changed.
  flips = {
    line['step']: max(v for k, v in line.items() if k.startswith('flips/'))
    for line in metrics(whole[0])
    if 'val_loss' in line
  }
  assert flips[5] > 0 and flips[10] > 0 and flips[15] > 0 and flips[20] == 0
  due = [step for step in range(STEPS) if setup(rigl).program.method.due(step)]
  assert due == [3, 6, 9, 12]


def test_damaged_lines_of_the_log_are_dropped_and_named(rigl, whole, tmp_path, train_until, capfd):
  train_until(rigl, tmp_path, 7)
  log = tmp_path / 'metrics.jsonl'
  bad = [b'{"step": 3, "l\xff": 1}', b'{"stfp": 3, "loss": 1.0}', b'[1, 2]', b'{"step": 2.5}']
  bad += [b'{"step": 3, "loss": "low"}', b'[' * 10_000]
  first, *others = log.read_bytes().splitlines()
  log.write_bytes(b'\n'.join([first, *bad, *others, b'{"step": 8, "lo']))
  capfd.readouterr()
  train(rigl, str(tmp_path), progress=False)
  said = capfd.readouterr().err
  assert (
    said.count(f'{log}: 7 damaged lines are left out, first line 2 (byte 14 is not UTF-8)') == 1
  )
  assert comparable(metrics(tmp_path)) == comparable(metrics(whole[0]))


def test_stopped_at_the_last_step_it_only_finishes(rigl, whole, tmp_path, train_until):
  train_until(rigl, tmp_path, STEPS)
  result = train(rigl, str(tmp_path), progress=False)
  assert result['metrics']['val_loss'] == whole[1]['metrics']['val_loss']
  # JSON has no NaN: a reader other than Python's would refuse the file.
  text = (tmp_path / 'result.json').read_text()
  json.loads(text, parse_constant=lambda name: pytest.fail(f'result.json holds {name}'))


def test_finished_run_returns_at_once(rigl, whole, finished, monkeypatch):
  def fail(*_):
    raise AssertionError('a finished run was trained')

  monkeypatch.setattr(Program, 'step', fail)
  monkeypatch.setattr(Checkpoints, 'restore', fail)
  before = {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()}
  assert train(rigl, str(finished), progress=False) == read_json(whole[0] / 'result.json')
  assert {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()} == before


def test_result_lost_before_it_was_written_logs_no_step_twice(rigl, whole, finished):
  (finished / 'result.json').unlink()
  result = train(rigl, str(finished), progress=False)
  assert result['metrics']['val_loss'] == whole[1]['metrics']['val_loss']
  assert comparable(metrics(finished)) == comparable(metrics(whole[0]))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('optimizer.learning_rate', 1e-4),
    ('seed', 1),
    ('weight.sparsity', 0.5),
    ('weight.name', 'set'),
    ('data.batch', 8),
    ('train.accumulation', 2),
  ],
)
def test_changed_config_is_refused(field, value, rigl, finished, tiny_config):
  changed = rigl.copy_and_resolve_references()
  group = changed
  for part in field.split('.')[:-1]:
    group = group[part]
  group[field.split('.')[-1]] = value
  before = {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()}
  with pytest.raises(UserError) as refused:
    train(changed, str(finished), progress=False)
  line = str(refused.value)
  assert f'config.{field}=' in line and repr(value) in line and '\n' not in line
  assert {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()} == before


def test_free_fields_may_change(rigl, whole, tmp_path, train_until):
  train_until(rigl, tmp_path, CUT)
  changed = rigl.copy_and_resolve_references()
  changed.train.update({'log_every': 4, 'eval_every': 3, 'checkpoint_every': 50})
  # The number of steps is free too, and another program: tests/train/test_cli.py changes it.
  assert {f'train.{name}' for name in ('steps', 'log_every', 'eval_every', 'checkpoint_every')} == {
    *FREE
  }
  result = train(changed, str(tmp_path), progress=False)
  assert result['metrics']['val_loss'] == whole[1]['metrics']['val_loss']
  logged = metrics(tmp_path)
  assert [line['step'] for line in logged if 'loss' in line] == [*range(1, CUT + 1), 12, 16, 20]
  assert [line['step'] for line in logged if 'val_loss' in line] == [5, 10, 12, 15, 18, 20]


def test_fewer_steps_than_done_are_refused_and_change_nothing(rigl, finished):
  changed = rigl.copy_and_resolve_references()
  changed.train.steps = STEPS - 5
  before = {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()}
  with pytest.raises(UserError, match=r'config\.train\.steps=15'):
    train(changed, str(finished), progress=False)
  assert {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()} == before


def test_changed_corpus_is_refused(rigl, finished, text_file):
  text = text_file.read_text()
  before = {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()}
  try:
    text_file.write_text(text.replace('river', 'mouse'))
    setups._load_data.cache_clear()  # another process would read the file anew
    with pytest.raises(UserError) as refused:
      train(rigl, str(finished), progress=False)
  finally:
    text_file.write_text(text)
    setups._load_data.cache_clear()
  assert 'other text' in str(refused.value) and '\n' not in str(refused.value)
  assert {f: f.read_bytes() for f in finished.rglob('*') if f.is_file()} == before


def test_a_damaged_config_file_is_one_line(tiny_config, tmp_path):
  (tmp_path / 'config.json').write_text('{"seed": ')
  with pytest.raises(UserError, match=r'config\.json is damaged'):
    train(tiny_config(), str(tmp_path), progress=False)
  assert (tmp_path / 'config.json').read_text() == '{"seed": '


LOSSES = {5: 3.0, 10: 1.0, 15: 0.5, 20: 4.0}  # by step, in place of the real ones


@pytest.fixture
def losses(monkeypatch):
  """`losses(of)`: the validation loss of a step, in place of the measured one."""
  measure = _Loop._measure

  def replaced(loop, state):
    found = measure(loop, state)
    found.values['val_loss'] = LOSSES[int(state.step)]
    return found

  monkeypatch.setattr(_Loop, '_measure', replaced)


@pytest.mark.usefixtures('losses')
def test_the_best_state_is_kept_and_loads(rigl, tmp_path, kill_at, train_until):
  # The newest checkpoint is of step 14: it knew 10 as the best, and 15 is evaluated again.
  kill_at(rigl, tmp_path / 'a', 16)
  assert saved_steps(tmp_path / 'a', 'best') == [10, 15]
  result = train(rigl, str(tmp_path / 'a'), progress=False)
  assert result['metrics']['val_loss'] == 4.0
  assert (result['metrics']['best_val_loss'], result['metrics']['best_step']) == (0.5, 15)
  assert saved_steps(tmp_path / 'a', 'best') == [15]

  newest, best = load(str(tmp_path / 'a')), load(str(tmp_path / 'a' / 'best'))
  assert (newest.step, best.step) == (STEPS, 15)
  train_until(rigl, tmp_path / 'b', 15)
  jax.tree.map(assert_array_equal, best.params, load(str(tmp_path / 'b')).params)
  assert best.source == f'{tmp_path}/a: the checkpoint of lowest validation loss, step 15'
  assert newest.source == (
    f'{tmp_path}/a: the newest checkpoint, step 20 (that of lowest validation loss, step 15, is '
    f'{tmp_path}/a/best)'
  )


@pytest.mark.usefixtures('losses')
@pytest.mark.parametrize(('end', 'best'), [(0.6, 15), (0.9, 20)])
def test_a_state_that_is_denser_than_the_final_one_is_not_the_best(
  end, best, tiny_config, tmp_path
):
  # The loss is lowest at step 15, before or after the last weights are dropped, at step 12 or 18.
  config = tiny_config(
    weight__name='magnitude', weight__sparsity=0.5, weight__end=end, weight__period=1,
    train__steps=STEPS, train__eval_every=5,
  )  # fmt: skip
  metrics = train(config, str(tmp_path), progress=False)['metrics']
  assert (metrics['best_step'], metrics['best_val_loss']) == (best, LOSSES[best])


@pytest.mark.usefixtures('losses')
def test_a_damaged_best_state_is_named_and_does_not_stop_the_run(
  rigl, tmp_path, train_until, capfd
):
  train_until(rigl, tmp_path, 12)
  for path in (tmp_path / 'best' / '10' / 'meta').iterdir():
    path.write_bytes(path.read_bytes()[:-40])
  assert train(rigl, str(tmp_path), progress=False)['metrics']['best_step'] == 15
  assert 'corrupt: checkpoint 10' in capfd.readouterr().err
