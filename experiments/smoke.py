"""Does the first study run end to end? One seed, its largest sparsity, 60 steps: no result to quote."""

import dataclasses

from experiments.sparsity_vs_accuracy import STUDY

SHORT = {'train.steps': 60, 'train.eval_every': 60, 'train.log_every': 20}
SMOKE = dataclasses.replace(
  STUDY,
  seeds=STUDY.seeds[:1],
  sparsities=(max(STUDY.sparsities),),
  common=STUDY.common | SHORT,
  caption='One seed, 60 steps: shows that the study runs, and no result',
)
runs, report = SMOKE.runs, SMOKE.report
