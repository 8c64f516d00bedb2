"""20 steps are 10 and 10 more on data with parts: prepared by TFDS, a mixture, pairs of bytes."""

import json

import jax
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.core import rng
from sparse_lm.data import prepare, sources
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load

STEPS, CUT = 20, 10


@pytest.fixture(scope='module')
def prepared(text_file, tmp_path_factory):
  out = str(tmp_path_factory.mktemp('tfds'))
  return prepare.prepare(out, 'text', prepare.text([str(text_file)]))


@pytest.fixture(params=['tfds', 'mixture'])
def config(request, prepared, text_file, tiny_config):
  mixture = f'tfds:{prepared}=0.3, files:{text_file}=0.7'
  return tiny_config(
    data__source=request.param,
    data__path={'tfds': str(prepared), 'mixture': mixture}[request.param],
    data__tokenizer={'tfds': 'chars', 'mixture': 'bpe'}[request.param],
    data__vocab_size=280,
    train__steps=STEPS,
    train__eval_every=CUT,
  )


def last_state(run, workdir):
  """The newest checkpoint's state, and the two batches that would have come next."""
  batches = run.data.train_iterator(rng.data_seed(run.config.seed))
  checkpoints = Checkpoints(workdir)
  state = checkpoints.restore(run.program.init(0, run.target), batches)
  checkpoints.close()
  return jax.device_get(state.replace(key=None)), [next(batches), next(batches)]


def test_continued_run_is_bit_exact(config, tmp_path, train_until):
  whole = train(config, str(tmp_path / 'whole'), progress=False)
  train_until(config, tmp_path / 'cut', CUT)
  result = train(config, str(tmp_path / 'cut'), progress=False)
  assert {**result['metrics'], 'train_step_ms': 0} == {**whole['metrics'], 'train_step_ms': 0}

  run = setup(config)
  (state, batches), (other, others) = (last_state(run, tmp_path / w) for w in ('whole', 'cut'))
  jax.tree.map(assert_array_equal, state, other)
  assert_array_equal(batches, others)

  # Each evaluated number says what it is of, and is that.
  losses = {name: result['metrics'][name] for name in result['evaluation']}
  numbers = result['evaluation']
  assert losses.keys() == {name for name in result['metrics'] if name.startswith('val_')}
  components = [name for name in losses if name.startswith('val_loss/')]
  assert len(components) == (2 if config.data.source == 'mixture' else 0)
  for name in ('val_loss', *components):
    assert numbers[name]['unit'] == f'nats per token of {config.data.tokenizer}'
    assert numbers[name]['tokenizer_sha256'] == run.data.tokenizer.digest
  if components:
    predictions = [numbers[name]['predictions'] for name in components]
    assert sum(predictions) == numbers['val_loss']['predictions']
    mean = sum(losses[name] * n for name, n in zip(components, predictions)) / sum(predictions)
    assert mean == pytest.approx(losses['val_loss'])
  line = json.loads((tmp_path / 'cut' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert losses.items() <= line.items()

  trained = load(str(tmp_path / 'cut'))  # which finds the tokenizer in the workdir
  assert trained.tokenizer == run.data.tokenizer
  loss = evaluate(run, trained.params, trained.model_state)['val_loss']
  assert loss == pytest.approx(losses['val_loss'])


def test_prepared_text_trains_as_the_files_do(prepared, text_file, tiny_config):
  one = setup(tiny_config(data__source='tfds', data__path=str(prepared))).data
  other = setup(tiny_config(data__split=sources.FRACTIONS)).data
  assert one.card['sha256'] == other.card['sha256']
  batches, others = one.train_iterator(5), other.train_iterator(5)
  assert_array_equal([next(batches) for _ in range(9)], [next(others) for _ in range(9)])
