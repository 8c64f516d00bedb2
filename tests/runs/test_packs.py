"""Packed runs are the runs alone to float32 rounding, whatever differs and wherever they stop."""

import contextlib
import functools
import json
import pathlib
import signal

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sparse_lm.core import rng
from sparse_lm.core.errors import Diverged, UserError
from sparse_lm.model import lm, slots
from sparse_lm.runs import loop, pack_loop, packs, runtime
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.loop import Stop, train
from sparse_lm.runs.pack_loop import train_packed
from sparse_lm.runs.packs import Pack
from sparse_lm.runs.record import Record
from sparse_lm.runs.setup import setup

LOGS = {'train__log_every': 4, 'train__eval_every': 6}
RIGL = {'weight__name': 'rigl', 'weight__period': 3}
GATES = ('gated', 'reinforce', 'moe_topk', 'layer_skip')  # a gate, a policy, experts, whole layers
# What differs among three runs of a pack.
DIFFER = (
  {'seed': 0, 'weight__sparsity': 0.5, 'optimizer__learning_rate': 1e-3},
  {'seed': 1, 'weight__sparsity': 0.75, 'optimizer__weight_decay': 0.3},
  {'seed': 1, 'weight__sparsity': 0.9, 'optimizer__learning_rate': 1e-2},
)


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def state_of(run, workdir):
  """The newest checkpoint's state, on the host."""
  checkpoints = Checkpoints(pathlib.Path(workdir))
  state = checkpoints.restore(run.start(), run.data.train_iterator(rng.data_seed(run.config.seed)))
  checkpoints.close()
  return jax.device_get(state.replace(key=None))


def assert_equal_runs(config, packed, alone):
  """Logs, results, checkpoints and best states of two folders of a run agree to rounding."""
  assert len(lines(packed)) == len(lines(alone))
  for ours, theirs in zip(lines(packed), lines(alone)):
    timed = ('tokens_per_second', 'packed_runs', 'packed_step_ms')
    ours, theirs = ({k: v for k, v in line.items() if k not in timed} for line in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-4, atol=1e-6)
  found, want = (json.loads((path / 'result.json').read_text()) for path in (packed, alone))
  assert found.keys() == want.keys()
  for name, value in want['metrics'].items():
    if isinstance(value, float) and name != 'train_step_ms':
      assert_allclose(found['metrics'][name], value, rtol=2e-4, atol=1e-6, err_msg=name)
  run = setup(config)
  state, other = state_of(run, packed), state_of(run, alone)
  assert jax.tree.structure(state) == jax.tree.structure(other)
  jax.tree.map(functools.partial(assert_allclose, rtol=1e-3, atol=1e-4), state, other)
  for folder in ('best', 'checkpoints'):
    steps = [max(int(p.name) for p in (path / folder).glob('[0-9]*')) for path in (packed, alone)]
    assert steps[0] == steps[1]


def pack_up(configs, places):
  return train_packed([setup(config) for config in configs], places, progress=False)


def both(configs, folder):
  """Trains runs packed and alone, and compares them."""
  places = [[folder / f'{how}{i}' for i in range(len(configs))] for how in ('packed', 'alone')]
  pack_up(configs, places[0])
  for config, packed, alone in zip(configs, *places):
    train(config, str(alone), progress=False)
    assert_equal_runs(config, packed, alone)


@pytest.fixture(scope='module')
def three(tiny_config):
  """Three runs of one program: masks are updated in steps 3, 6 and 9 of 12."""
  return [tiny_config(**RIGL, **LOGS, **differ) for differ in DIFFER]


@pytest.fixture(scope='module')
def alone(three, tmp_path_factory):
  """Their folders, of runs alone."""
  folder = tmp_path_factory.mktemp('alone')
  places = [folder / str(number) for number in range(len(three))]
  for config, place in zip(three, places):
    train(config, str(place), progress=False)
  return places


@contextlib.contextmanager
def before_step(number, act):
  """In the block packs call `act()` before that step of the run, counted from 0."""
  compiled = Pack.compiled

  def watched(pack, first):
    count = [first]

    def watching(step):
      def call(*arguments):
        if count[0] == number:
          act()
        count[0] += 1
        return step(*arguments)

      return call

    return {updates: watching(step) for updates, step in compiled(pack, first).items()}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Pack, 'compiled', watched)
    yield


@contextlib.contextmanager
def stopped_in(step):
  """SIGTERM arrives in that step, counted from 1, and stops the pack of the block."""
  terminate = functools.partial(signal.raise_signal, signal.SIGTERM)
  with before_step(step - 1, terminate), pytest.raises(SystemExit) as stopped:
    yield
  assert stopped.value.code == 128 + signal.SIGTERM


class Late(Stop):
  """A signal that comes right after a loop has asked for one the first time."""

  asked = 0

  @property
  def signum(self):
    self.asked += 1
    return signal.SIGTERM if self.asked > 1 else None

  @signum.setter
  def signum(self, value):
    pass


def test_a_signal_during_a_save_waits_for_the_next_step(three, tmp_path, monkeypatch, capsys):
  for module in (loop, pack_loop):
    monkeypatch.setattr(module, 'Stop', Late)
  monkeypatch.setattr(lm, 'notes', lambda model: ['Rules leave a layer.'])
  with pytest.raises(SystemExit):
    train(three[0], str(tmp_path / 'alone'), progress=False)
  with pytest.raises(SystemExit):
    train_packed([setup(config) for config in three], [tmp_path / i for i in '012'])
  assert [saved(tmp_path / name) for name in ('alone', '0', '1')] == [['2'], ['6'], ['6']]
  assert 'Rules leave a layer.' in capsys.readouterr().err


class Killed(Exception):
  """What stops a pack without a chance to save."""


def kill():
  raise Killed


def test_packed_runs_equal_the_same_runs_alone(three, alone, tmp_path):
  places = [tmp_path / str(number) for number in range(len(three))]
  results = pack_up(three, places)
  for config, packed, place, result in zip(three, places, alone, results):
    assert_equal_runs(config, packed, place)
    assert result['metrics']['packed_runs'] == 3 and result['metrics']['train_step_ms'] is None
  # Finished runs are not trained again.
  assert pack_up(three, places) == results


@pytest.mark.slow
@pytest.mark.parametrize('name', slots.names('weight'))
def test_every_weight_method_packs(name, tiny_config, tmp_path):
  traits = slots.method('weight', name).traits
  fields = {'weight__name': name, **LOGS}
  own = slots.defaults('weight', name)
  if 'period' in own:
    fields['weight__period'] = 3
  differ = [dict(each) for each in DIFFER[:2]]
  if traits.controlled or not traits.masked:
    for number, each in enumerate(differ):
      each.pop('weight__sparsity')
      if traits.controlled:
        each['weight__price'] = 0.1 * number
  configs = [tiny_config(**fields, **each) for each in differ]
  try:
    runs = [setup(config) for config in configs]
  except UserError:
    pytest.skip('the method does not train')
  if reason := packs.alone_because(runs[0]):
    with pytest.raises(UserError, match=reason[:10]):
      Pack.of(runs)
    return
  both(configs, tmp_path)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
  name=st.sampled_from(('rigl', 'top_kast', 'magnitude', 'movement_soft', *GATES)),
  seed=st.integers(0, 2**31 - 2),
  cut=st.integers(1, 11),
)
def test_stopped_packs_equal_runs_alone(name, seed, cut, tiny_config, tmp_path_factory):
  configs = [tiny_config(f'configs/{name}.py', **LOGS, seed=seed + i) for i in range(2)]
  folder = tmp_path_factory.mktemp('any')
  places = [folder / '0', folder / '1']
  with stopped_in(cut):
    pack_up(configs, places)
  pack_up(configs, places)
  train(configs[1], str(folder / 'alone'), progress=False)
  assert_equal_runs(configs[1], places[1], folder / 'alone')


@pytest.mark.parametrize(
  'cut', [4, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (6, 8, 12))]
)
def test_a_pack_that_is_stopped_continues_packed_and_alone(cut, three, alone, tmp_path):
  places = [tmp_path / str(number) for number in range(len(three))]
  with stopped_in(cut):
    pack_up(three, places)
  assert [max(map(int, saved(place))) for place in places] == [cut] * 3
  # One alone; the two others are a pack of another size.
  train(three[0], str(places[0]), progress=False)
  pack_up(three, places)
  for config, place, want in zip(three, places, alone):
    assert_equal_runs(config, place, want)


def saved(place):
  return [path.name for path in (place / 'checkpoints').glob('[0-9]*')]


@pytest.mark.slow
def test_runs_that_stopped_at_different_steps_are_continued_packed(
  three, alone, tmp_path, train_until
):
  places = [tmp_path / str(number) for number in range(len(three))]
  for config, place, step in zip(three, places, (5, 5, 7)):
    train_until(config, place, step)
  pack_up(three, places)
  for config, place, want in zip(three, places, alone):
    assert_equal_runs(config, place, want)


@pytest.mark.slow
def test_a_killed_pack_continues_from_its_checkpoints(three, alone, tmp_path):
  places = [tmp_path / str(number) for number in range(len(three))]
  with before_step(7, kill), pytest.raises(Killed):
    pack_up(three, places)
  assert [saved(place) for place in places] == [[], [], []]
  pack_up(three, places)
  for config, place, want in zip(three, places, alone):
    assert_equal_runs(config, place, want)


def test_a_run_that_diverges_stops_and_leaves_the_others_alone(three, alone, tmp_path, tiny_config):
  lost = tiny_config(**RIGL, **LOGS, optimizer__learning_rate=1e30)
  places = [tmp_path / str(number) for number in range(3)]
  results = pack_up([three[0], lost, three[2]], places)
  assert isinstance(results[1], Diverged) and 'config.optimizer.learning_rate than 1e+30' in str(
    results[1]
  )
  assert not (places[1] / 'result.json').exists() and not saved(places[1])
  for number in (0, 2):
    assert_equal_runs(three[number], places[number], alone[number])


def test_a_run_that_diverges_keeps_its_best_state(three, tmp_path, monkeypatch):
  check = Record.check_finite

  def diverging(record, name, value, step):
    check(record, name, float('nan') if record is records[1] and step == 8 else value, step)

  records, made = [], Record.__init__
  monkeypatch.setattr(
    Record, '__init__', lambda self, *own: records.append(self) or made(self, *own)
  )
  monkeypatch.setattr(Record, 'check_finite', diverging)
  places = [tmp_path / str(number) for number in range(3)]
  assert isinstance(pack_up(three, places)[1], Diverged)
  assert [path.name for path in (places[1] / 'best').glob('[0-9]*')] == ['6']


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  GATES,
)
def test_gates_and_rules_pack(name, tiny_config, tmp_path):
  both([tiny_config(f'configs/{name}.py', **LOGS, seed=seed) for seed in (0, 1)], tmp_path)


@pytest.mark.slow
def test_tokens_that_skip_layers_pack(tiny_config, tmp_path):
  fields = {'config': 'configs/mixture_of_depths.py', 'model__layers': 2, **LOGS}
  both([tiny_config(**fields, seed=seed) for seed in (0, 1)], tmp_path)


@pytest.mark.slow
def test_rules_with_prices_of_their_own_pack(tiny_config, tmp_path):
  fields = {
    'weight__order': ('mlp', 'attention'),
    'weight__rules__mlp__name': 'rigl',
    'weight__rules__mlp__match': ('mlp',),
    'weight__rules__mlp__period': 3,
    'weight__rules__attention__name': 'top_kast',
    'weight__rules__attention__match': ('attention',),
    'weight__rules__attention__sparsity': 0.5,
  }
  differ = (
    {'weight__rules__mlp__sparsity': 0.5, 'weight__rules__attention__penalty_weight': 1e-2},
    {'weight__rules__mlp__sparsity': 0.9, 'seed': 1},
  )
  both([tiny_config(**fields, **LOGS, **each) for each in differ], tmp_path)


@pytest.mark.slow
def test_budgets_pack(tiny_config, tmp_path):
  fields = {'weight__name': 'l0', 'weight__price': 0.0, **LOGS}
  differ = ({'budget__target': 0.9}, {'budget__target': 0.8, 'budget__rate': 0.1})
  both([tiny_config(**fields, **each) for each in differ], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields',
  [
    {'train__accumulation': 2, 'optimizer__ema': 0.9},
    {'optimizer__decay_last': True, 'optimizer__schedule': 'linear', 'model__dropout': 0.1},
    {'optimizer__name': 'lion', 'optimizer__normalize': True, 'optimizer__clip': 0.0},
  ],
)
def test_other_steps_pack(fields, tiny_config, tmp_path):
  both([tiny_config(**RIGL, **LOGS, **fields, **differ) for differ in DIFFER[:2]], tmp_path)


def test_what_cannot_be_packed_is_named(tiny_config, three):
  other = setup(tiny_config(**RIGL, **LOGS, model__width=32))
  assert packs.difference(setup(three[0]), other) == 'they differ in config.model.width (16 and 32)'
  assert packs.difference(setup(three[0]), setup(three[1])) is None
  with pytest.raises(UserError, match='cannot be packed: they differ in'):
    Pack.of([setup(three[0]), other])
  fields = {'weight__name': 'l0', 'weight__price': 0.0, **LOGS}
  controlled = setup(tiny_config(**fields, budget__target=0.9))
  reason = packs.difference(controlled, setup(tiny_config(**fields)))
  assert reason.startswith('they differ in config.budget.')
  at_start = setup(tiny_config(weight__name='magnitude', weight__schedule='at_start'))
  assert packs.alone_because(at_start) == 'its masks are chosen before the first step'


def test_runs_are_split_into_packs_of_nearly_equal_size(tiny_config):
  runs = [setup(tiny_config(seed=seed)) for seed in range(5)]
  runs.insert(1, setup(tiny_config(model__width=32)))
  assert packs.split(runs, 3) == [[0, 2], [3, 4, 5], [1]]
  assert packs.split(runs, 10) == [[0, 2, 3, 4, 5], [1]]


def test_a_pack_is_estimated_before_it_starts(three, monkeypatch):
  pack = Pack.of([setup(config) for config in three])
  assert packs.fitting(pack) == 3
  least, need = pack.bytes_at_least(), pack.bytes()
  # Parameters, two moments and masks of 2,608 weights and more.
  assert 3 * 2608 * 3 * 4 < least < need
  monkeypatch.setattr(runtime, 'memory', lambda: need - 1)
  assert packs.fitting(pack) == 2
  # The text takes its memory once, whatever the number of runs.
  two = pack.only([0, 1]).bytes_at_least()
  for room, fits in ((two, 2), (two - 1, 1)):
    monkeypatch.setattr(runtime, 'memory', lambda room=room: room)
    assert packs.fitting(pack) == fits
  monkeypatch.setattr(runtime, 'memory', lambda: least // 2)
  assert packs.fitting(pack) == 1
