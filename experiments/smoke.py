"""Does the first study run end to end? One seed, its largest sparsity, 60 steps: no result to quote."""

import dataclasses

from experiments import sparsity_vs_accuracy as study
from experiments.sweep import Run

SHORT = {'train.steps': 60, 'train.eval_every': 60, 'train.log_every': 20}
report = study.report


def runs() -> list[Run]:
  """The dense models and every method once."""
  return [
    dataclasses.replace(run, overrides=run.overrides | SHORT)
    for run in study.runs()
    if run.overrides['seed'] == 0 and run.labels['sparsity'] in (0.0, max(study.SPARSITIES))
  ]
