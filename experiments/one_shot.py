"""How much validation loss does one-shot pruning cost, before and after fine-tuning?

Magnitude pruning, Wanda and SparseGPT prune the same trained dense models to 50 %, 70 %, 2:4 and 4:8.
Each pruned model is then fine-tuned for a fifth of the training steps with fixed masks, once on the
text alone and once with distillation from the dense model. As a control, the dense model is fine-tuned
in both ways as well.
"""

import pathlib
import shutil

from experiments.study import reproduce
from experiments.sweep import Run
from sparse_lm.core.records import JsonObject
from sparse_lm.prune import prune
from sparse_lm.report import categories, plot, results, table
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
# Fine-tuning: a fifth of the parent's steps at half of its learning rate.
TUNING = {'train.steps': 100, 'train.eval_every': 100, 'optimizer.learning_rate': 3e-3}
CAPTION = (
  'One-shot pruning of trained models of 2 layers of width 64 (500 steps on bytes of the Python '
  "standard library's source), calibrated on 128 sequences of 64 bytes of the training text, and "
  'fine-tuned for 100 steps with fixed masks; no setting was tuned. Magnitude pruning ranks the '
  'weights of a whole matrix, Wanda those of each output'
)


def runs() -> list[Run]:
  """The dense models, then each method at each setting, over seeds."""
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
  """Prunes the dense parent, which is trained first if it is missing, and fine-tunes it in two ways."""
  runtime.prepare()
  seed = run.overrides['seed']
  parent = workdir.parent.parent / 'parents' / f'seed{seed}'
  result = train(configs.load(CONFIG, {'seed': seed}), str(parent))
  weight = {field: value for field, value in run.overrides.items() if field != 'seed'}
  start, method = parent, 'none'
  if weight:
    start, method = workdir / 'pruned', 'static'
    # An interrupted study may have left a folder here, and `prune` refuses to overwrite one.
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
  """Writes the table and the figure."""
  columns = [
    table.column('val_loss'),
    table.Column('tuned_loss', 'loss after fine-tuning', '.4f', 'nats/token', paired=True),
    table.Column('distilled_loss', 'loss after distillation', '.4f', 'nats/token', paired=True),
    *map(table.column, ('sparsity_prunable', 'sparsity_total', 'flops_forward_ratio')),
    table.column('stored_bytes'),
    table.Column('prune_seconds', 'time to prune', '.1f', 's'),
  ]
  frame = table.summarise(lines, ['method', 'setting'], columns, {'method': 'dense'})
  stages = {'val_loss': 'pruned', 'tuned_loss': 'fine-tuned', 'distilled_loss': 'distilled'}
  shown = [
    line
    | {
      'labels': line['labels'] | {'stage': stage},
      'metrics': {'loss': line['metrics'][metric]},
    }
    for metric, stage in stages.items()
    for line in lines
  ]
  loss = table.Column('loss', 'validation loss', '.4f', 'nats/token')
  figure = categories.dots(shown, 'setting', loss, 'method', {'method': 'dense'}, panel='stage')
  plot.save(figure, folder, 'one_shot')
  return table.write(frame, folder, CAPTION, reproduce(lines, folder))
