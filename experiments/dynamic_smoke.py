"""Does the study `dynamic_compute` run end to end? One seed and 40 steps give no result to quote."""

import dataclasses

from experiments import dynamic_compute as study
from experiments.sweep import Run

SHORT = {'train.steps': 40, 'train.eval_every': 40, 'train.log_every': 10}
report = study.report


def runs() -> list[Run]:
  """Returns one run of each method, at its smallest budget."""
  last = {run.labels['method']: run for run in study.runs() if run.overrides['seed'] == 0}
  return [dataclasses.replace(run, overrides=run.overrides | SHORT) for run in last.values()]
