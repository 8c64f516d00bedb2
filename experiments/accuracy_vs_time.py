"""How much time do trained sparse models save after packing, and at what validation loss?

Every trained model of `dynamic_compute` is packed and timed in turns with the dense model of that study,
whose weights are random. Models are read from the folder of that study; a model that is missing there is
trained there. A line of this study holds times and the id of the run that was timed. The loss and the
FLOPs are read from the line of that run.
"""

import pathlib

import numpy as np
from ml_collections import ConfigDict

from experiments import dynamic_compute
from experiments.study import Study
from experiments.sweep import Run
from sparse_lm.core.errors import UserError
from sparse_lm.core.records import JsonObject
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.speed import Speed
from sparse_lm.inference.pack import dense_twin, pack
from sparse_lm.model import lm
from sparse_lm.report import plot, results, table
from sparse_lm.runs import configs, runtime, trained
from sparse_lm.runs.environment import environment
from sparse_lm.runs.setup import data_of

STUDIES = {'dynamic_compute': dynamic_compute}
PREFILLED = 8
REPEATS = {'decode': 31, 'prefill': 15}
DENSE = {'method': 'dense', 'setting': 'whole'}  # the labels of the dense model in the table


def runs() -> list[Run]:
  """Returns the runs of the studies, except random gates, which cannot decode."""
  return [
    Run(run.config, run.overrides, {'study': study, **_row(run)}, execute)
    for study, module in STUDIES.items()
    for run in module.runs()
    if run.overrides.get('depth.estimator') != 'random'
  ]


def _row(run: Run) -> dict[str, str]:
  labels = run.labels
  setting = labels['setting'] if 'setting' in labels else f'{labels["sparsity"]:.0%}'
  return {'method': labels['method'], 'setting': setting}


def execute(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Packs the model and times it. Trains the model first if its study has not done so."""
  runtime.prepare()
  study = Study.load(run.labels['study'], workdir.parents[2])
  (origin,) = [found for found, other in study.runs.items() if other.overrides == run.overrides]
  study.train({origin: study.runs[origin]})
  model = trained.load(str(study.workdir(origin)))
  packed = pack(model.program.model, model.params, model.masks, model.model_state)
  dense = dense_twin(lm.from_config(_dense(study.name), model.tokenizer.vocab_size))
  config = model.config
  text = np.asarray(data_of(config).tokens['validation'])
  metrics = {}
  for what, batch in (('decode', 1), ('prefill', PREFILLED)):
    data = EvalData(text, config.data.context, batch)
    metrics |= Speed(REPEATS[what], (what,)).run(EvalModel.of_packed(packed, dense), data)
  return {
    'origin': origin,
    'metrics': metrics,
    'config': configs.to_json(config),
    'env': environment(),
  }


def _dense(study: str) -> ConfigDict:
  """Returns the config of the study's dense model."""
  first = STUDIES[study].runs()[0]
  assert first.labels['method'] == 'dense', first
  return configs.load(first.config, first.overrides)


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table, and the figure of loss against theoretical and measured cost."""
  lines = [_labelled(line) for line in with_time(_with_loss(lines, folder))]
  flops = table.column('flops_forward')
  time = table.Column('time_ms', 'decode', '.3f', 'ms/token')
  columns = [
    table.column('val_loss'),
    flops,
    time,
    *table.speedup('decode_speedup', 'decode'),
    *table.speedup('prefill_speedup', 'prefill'),
    table.Column('weights_bytes', 'size of the weights', ',.0f', 'kB', 1e-3),
    table.Column('read_bytes', 'memory read', ',.0f', 'kB/token', 1e-3),
  ]
  frame = table.summarise(lines, ['study', 'method', 'setting'], columns, DENSE)
  sizes = [
    f'{model.layers} layers of width {model.width} in {name}'
    for name, model in ((study, _dense(study).model) for study in STUDIES)
  ]
  caption = (
    f'Trained models after packing, beside the dense model of their study ({"; ".join(sizes)}). '
    f'float32; decoding with batch 1, prefill with batch {PREFILLED} of 64 tokens. Speed-ups are dense '
    f'time / packed time, medians of {REPEATS["decode"]} turns (decoding) and {REPEATS["prefill"]} '
    'turns (prefill), with quartiles over the turns. The decode time of a row is the median time of '
    "its study's dense model divided by the speed-up of the row"
  )
  for cost, name in ((flops, 'accuracy_vs_flops'), (time, 'accuracy_vs_time')):
    figure = plot.curves(lines, cost, table.column('val_loss'), 'method', front=True)
    plot.save(figure, folder, name)
  return table.write(frame, folder, caption, 'python -m experiments.run accuracy_vs_time')


def _with_loss(lines: list[results.Line], folder: pathlib.Path) -> list[results.Line]:
  """Adds the loss and the FLOPs of the runs that were timed, from the lines of these runs."""
  found = {}
  for study in {line['labels']['study'] for line in lines}:
    for origin in results.read_file(folder.parent / study / 'runs.jsonl'):
      found[study, origin['run']] = origin['metrics']
  joined = []
  for line in lines:
    metrics = found.get((line['labels']['study'], line['origin']))
    if metrics is None:
      raise UserError(
        f'{line["labels"]["study"]} has no line of the run {line["origin"]}, which was timed; valid: '
        'the lines of both studies from one folder of results'
      )
    measured = {name: metrics[name] for name in ('val_loss', 'flops_forward')}
    joined.append(line | {'metrics': measured | line['metrics']})
  return joined


def _labelled(line: results.Line) -> results.Line:
  dense = line['labels']['method'] == 'dense'
  return line | {'labels': line['labels'] | (DENSE if dense else {})}


def with_time(lines: list[results.Line]) -> list[results.Line]:
  """Adds `time_ms`, a decode time per token that is comparable between the runs of a study.

  A shared machine is slower in some hours than in others, so only ratios within a run are comparable.
  The time is that of the dense model, as the median over the study, divided by the run's speed-up.
  """
  dense = {
    study: np.nanmedian(
      [line['metrics']['dense_decode_ms'] for line in lines if line['labels']['study'] == study]
    )
    for study in {line['labels']['study'] for line in lines}
  }
  return [
    line
    | {
      'metrics': line['metrics']
      | {'time_ms': float(dense[line['labels']['study']] / line['metrics']['decode_speedup'])}
    }
    for line in lines
  ]
