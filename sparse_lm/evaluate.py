"""`python -m sparse_lm.evaluate --workdir=FOLDER`: runs evaluations of a trained or packed model."""

import json
import sys

from tabulate import tabulate

from sparse_lm import evals
from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.ranges import Range
from sparse_lm.core.records import JsonObject
from sparse_lm.data.corpus import SPLITS
from sparse_lm.evals import Values
from sparse_lm.runs import runnable, runtime


def evaluate(
  workdir: str, tasks: tuple[str, ...] = (), split: str = 'validation', batch: int | None = None
) -> JsonObject:
  """Runs evaluations, each with its default options, on the text that the model was trained on.

  Args:
    workdir: a workdir or a packed folder.
    tasks: names of evaluations. By default all that accept the model and the text.
    split: 'train', 'validation' or 'test'.
    batch: sequences that are evaluated together, by default `config.data.batch`.

  Returns:
    A dict with `source` (the folder and the checkpoint, in words), `split`, `values` (for each evaluation
    its metrics, which its class in `evals/` describes), and `left_out` (for each evaluation that was left
    out the reason).

  Raises:
    UserError: an unknown evaluation or split, a folder without a model, or text that has changed since
      training; also if an evaluation of `tasks`, or every evaluation, refuses the model or the text.
  """
  found = {name: evals.evaluation(name)() for name in tasks or evals.names()}
  if split not in SPLITS:
    raise unknown('--split', split, SPLITS)
  run = runnable.load(workdir)
  model, data = run.eval_model(), run.eval_data(split, batch)
  values: dict[str, Values] = {}
  left_out: dict[str, str] = {}
  for name, evaluation in found.items():
    try:
      values[name] = evaluation.run(model, data)
    except UserError as error:
      left_out[name] = str(error)
      if tasks or len(left_out) == len(found):
        raise
  return {'source': run.source, 'split': split, 'values': values, 'left_out': left_out}


def table(values: dict[str, Values]) -> str:
  """Returns a Markdown table with a row for each metric."""
  rows = [(task, name, _text(x)) for task, found in values.items() for name, x in found.items()]
  return tabulate(rows, ('task', 'metric', 'value'), tablefmt='github', disable_numparse=True)


def _text(value: float | int | None) -> str:
  if value is None:
    return '-'
  return f'{value:,}' if isinstance(value, int) else f'{value:.6g}'


@one_line
def main() -> None:
  """Prints the metrics and the checkpoint that was evaluated."""
  parser = Parser('python -m sparse_lm.evaluate')
  parser.add_argument('--workdir', type=local_path, required=True, help='workdir or packed folder')
  tasks = ','.join(evals.names())
  parser.add_argument('--task', help=f'some of {tasks}; default: all that apply')
  parser.add_argument('--split', default='validation', help=', '.join(SPLITS))
  batch = Range(int, '[1, 2^24]')
  parser.add_argument('--batch', type=batch, help='batch size; default: that of training')
  parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
  given = parser.parse_args()
  asked = () if given.task is None else tuple(name.strip() for name in given.task.split(','))
  runtime.prepare()
  found = evaluate(given.workdir, asked, given.split, given.batch)
  for name, reason in found['left_out'].items():
    print(f'left out: {name} ({reason})', file=sys.stderr)
  text = f'{table(found["values"])}\n\n{found["source"]}; {found["split"]} split'
  print(json.dumps(found, indent=2) if given.json else text)


if __name__ == '__main__':
  main()
