"""What does pruning a trained model at once cost in validation loss, before and after fine-tuning?

Magnitude, Wanda and SparseGPT at 50 %, 70 %, 2:4 and 4:8 of the same dense models, over seeds; then a
fifth of the training again with the masks kept, on the text alone and taught by the dense model. The
dense model is trained on as long, with and without its own teaching, as a control.
"""

import pathlib
import shutil

from experiments.sweep import Run
from sparse_lm.core.records import JsonObject
from sparse_lm.prune import prune
from sparse_lm.report import plot, results, table
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.loop import train

CONFIG = 'configs/ablation.py'
SEEDS = (0, 1, 2)
METHODS = ('magnitude', 'wanda', 'sparsegpt')
SETTINGS = {
  '50 %': {'weight.sparsity': 0.5},
  '70 %': {'weight.sparsity': 0.7},
  '2:4': {'weight.sparsity': 0.5, 'weight.pattern': '2:4'},
  '4:8': {'weight.sparsity': 0.5, 'weight.pattern': '4:8'},
}
# A fifth of the parent's steps at half of its learning rate.
TUNING = {'train.steps': 100, 'train.eval_every': 100, 'optimizer.learning_rate': 3e-3}
CAPTION = (
  'One-shot pruning of trained models of 2 layers of width 64 (500 steps on bytes of the Python standard '
  "library's source), calibrated on 128 sequences of 64 bytes of the training text, then trained on for "
  '100 steps with the masks kept; no setting was tuned. Magnitude ranks a whole matrix, Wanda the inputs '
  'of each output'
)


def runs() -> list[Run]:
  """The dense models, then each method at each setting."""
  rows = [('dense', '0 %', {})]
  rows += [
    (method, setting, {'weight.name': method} | fields)
    for setting, fields in SETTINGS.items()
    for method in METHODS
  ]
  return [
    Run(CONFIG, fields | {'seed': seed}, {'method': method, 'setting': setting}, execute)
    for method, setting, fields in rows
    for seed in SEEDS
  ]


def execute(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Trains the dense parent if it is not there yet, prunes it, and trains on in two ways."""
  runtime.prepare()
  seed = run.overrides['seed']
  parent = workdir.parent.parent / 'parents' / f'seed{seed}'
  result = train(configs.load(CONFIG, {'seed': seed}), str(parent))
  weight = {field: value for field, value in run.overrides.items() if field != 'seed'}
  start, method = parent, 'none'
  if weight:
    start, method = workdir / 'pruned', 'static'
    # What an interrupted study left here is made again, alike; `prune` writes over nothing.
    shutil.rmtree(start, ignore_errors=True)
    result = prune(str(parent), str(start), weight)
  again = TUNING | {'seed': seed, 'init_from': str(start), 'weight.name': method}
  taught = again | {'distill.teacher': str(parent)}
  tuned, distilled = (
    train(configs.load(CONFIG, fields), str(workdir / name))['metrics']['val_loss']
    for name, fields in (('tuned', again), ('distilled', taught))
  )
  metrics = result['metrics'] | {'tuned_loss': tuned, 'distilled_loss': distilled}
  return result | {'metrics': metrics}


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Table and figure."""
  columns = [
    table.column('val_loss'),
    table.Column('tuned_loss', 'after fine-tuning', '.4f', 'nats/token', paired=True),
    table.Column('distilled_loss', 'after distillation', '.4f', 'nats/token', paired=True),
    *map(table.column, ('sparsity_prunable', 'sparsity_total', 'flops_forward_ratio')),
    table.column('stored_bytes'),
    table.Column('prune_seconds', 'pruning', '.1f', 's'),
  ]
  frame = table.summarise(lines, ['method', 'setting'], columns, {'method': 'dense'})
  stages = {'val_loss': 'pruned', 'tuned_loss': 'fine-tuned', 'distilled_loss': 'distilled'}
  shown = [
    line
    | {
      'labels': {'method': labels['method'], 'stage': f'{labels["setting"]}, {stage}'},
      'metrics': {'loss': line['metrics'][metric]},
    }
    for metric, stage in stages.items()
    for line in lines
    for labels in [line['labels']]
    if labels['method'] != 'dense'
  ]
  loss = table.Column('loss', 'validation loss', '.4f', 'nats/token')
  plot.save(plot.dots(shown, 'stage', loss, 'method'), folder, 'one_shot')
  return table.write(frame, folder, CAPTION, f'python -m experiments.run {folder.name}')
