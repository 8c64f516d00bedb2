"""`python -m sparse_lm.evaluate --workdir=FOLDER`: runs evaluations of a trained or packed model."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence

from tabulate import tabulate

from sparse_lm import evals
from sparse_lm.commands.config_arguments import overrides_from_args
from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.records import Json, JsonObject
from sparse_lm.data.corpus import SPLITS
from sparse_lm.evals import DEFAULT, SIZES, Evaluation, Option, Values, Windows
from sparse_lm.runs import runnable, runtime
from sparse_lm.runs.configs import Overrides

_HELP = {
  'context': 'tokens per window; default: that of training',
  'stride': 'distance between the starts of windows in tokens; default: the context',
  'max_tokens': 'only the first tokens of the split; default: all',
  'batch': 'windows that are evaluated together; default: that of training',
}
_LAYER = re.compile(r'block_\d+')  # in names of metrics
_TEXT_HELP = (
  '--config.data.path=FILES evaluates another text; its split is a part of it, by --config.data.split '
  '(train, validation, test): with --config.data.split=0,0,1 the whole text is the test split'
)


def evaluate(
  workdir: str,
  tasks: Sequence[str | Evaluation] = (),
  split: str = 'validation',
  windows: Windows = DEFAULT,
  text: Overrides | None = None,
) -> JsonObject:
  """Runs evaluations, by default on the text that the model was trained on.

  Args:
    workdir: a workdir or a packed folder.
    tasks: names of evaluations, or evaluations with options of their own. By default all that read the
      text and accept the model.
    split: 'train', 'validation' or 'test'.
    windows: how much of the split is read, and in which windows.
    text: fields of `config.data` that name another text, such as `{'data.path': 'other.txt'}`.

  Returns:
    A dict with `source` (the folder and the checkpoint, in words), `split`, `values` (for each evaluation
    its metrics, which its class in `evals/` describes), `cards` (for each evaluation what its metrics
    were measured on), and `left_out` (for each evaluation that was left out the reason).

  Raises:
    UserError: an unknown evaluation or split, a folder without a model, windows that the model cannot
      read, or text that cannot be read or has changed since training; also if an evaluation of `tasks`,
      or every evaluation, refuses the model or the text.
  """
  by_default = [name for name in evals.names() if evals.evaluation(name).reads_text]
  found = dict(map(_named, tasks or by_default))
  if split not in SPLITS:
    raise unknown('--split', split, SPLITS)
  run = runnable.load(workdir)
  model, none = run.eval_model(), run.eval_data(None, windows)
  reads = any(evaluation.reads_text for evaluation in found.values())
  data = run.eval_data(split, windows, text) if reads else none
  values: dict[str, Values] = {}
  cards: dict[str, JsonObject] = {}
  left_out: dict[str, str] = {}
  for name, evaluation in found.items():
    own = data if evaluation.reads_text else none
    try:
      values[name] = evaluation.run(model, own)
      cards[name] = evaluation.card(model, own)
    except UserError as error:
      left_out[name] = str(error)
      if tasks or len(left_out) == len(found):
        raise
  return {
    'source': run.source,
    'split': split,
    'values': values,
    'cards': cards,
    'left_out': left_out,
  }


def _named(task: str | Evaluation) -> tuple[str, Evaluation]:
  """Returns the name of an evaluation, and the evaluation; with default options if only named."""
  if isinstance(task, Evaluation):
    return type(task).__module__.rpartition('.')[2].rstrip('_'), task
  return task, evals.evaluation(task)()


def table(values: dict[str, Values]) -> str:
  """Returns a Markdown table with a row for each metric, and for the mean of a metric over layers."""
  rows = []
  for task, found in values.items():
    alike: dict[str, list[float | int | None]] = {}
    for name, x in found.items():
      alike.setdefault(_LAYER.sub('block_*', name), []).append(x)
    for name, each in alike.items():
      known = [x for x in each if x is not None]
      mean = f'{_text(sum(known) / len(known))} (mean of {len(known)})' if len(known) > 1 else ''
      rows.append((task, name, mean or _text(each[0])))
  return tabulate(rows, ('task', 'metric', 'value'), tablefmt='github', disable_numparse=True)


def _text(value: float | int | None) -> str:
  if value is None:
    return '-'
  return f'{value:,}' if isinstance(value, int) else f'{value:.6g}'


def _measured_on(cards: dict[str, JsonObject]) -> list[str]:
  """Returns a line for each evaluation with a card, without units and with shortened digests."""
  return [
    f'{task}: ' + ', '.join(f'{key} {_shown(key, x)}' for key, x in card.items() if key != 'unit')
    for task, card in cards.items()
    if card
  ]


def _shown(key: str, value: Json) -> str:
  if key.endswith('_sha256'):
    return str(value)[:12]
  return f'{value:,}' if isinstance(value, int) else str(value)


def _options() -> dict[str, dict[str, dataclasses.Field]]:
  """Returns the options that are arguments of this command, by name and by evaluation."""
  found: dict[str, dict[str, dataclasses.Field]] = {}
  for task in evals.names():
    for field in dataclasses.fields(evals.evaluation(task)):
      if 'help' in field.metadata:
        found.setdefault(field.name, {})[task] = field
  return found


def _chosen(given: argparse.Namespace) -> list[str | Evaluation]:
  """Returns the evaluations that the command line names, with their options; none if it names none.

  Raises UserError for an unknown evaluation, and for an option of an evaluation that is not named.
  """
  names = [] if given.task is None else [name.strip() for name in given.task.split(',')]
  options: dict[str, dict[str, Option]] = {name: {} for name in names}
  for option, tasks in _options().items():
    value = vars(given)[option]
    if value is None:
      continue
    if not set(tasks) & set(names):
      raise UserError(
        f'--{option}={value} is an option of {" and ".join(tasks)}; valid: --task={next(iter(tasks))}'
      )
    for task in set(tasks) & set(names):
      options[task][option] = value
  return [evals.evaluation(name)(**own) for name, own in options.items()]


def _parser() -> Parser:
  parser = Parser('python -m sparse_lm.evaluate')
  parser.epilog = _TEXT_HELP
  parser.add_argument('--workdir', type=local_path, required=True, help='workdir or packed folder')
  tasks = ','.join(evals.names())
  parser.add_argument('--task', help=f'some of {tasks}; default: all that read the text and apply')
  parser.add_argument('--split', default='validation', help=', '.join(SPLITS))
  for name, meaning in _HELP.items():
    parser.add_argument(f'--{name}', type=SIZES[name], help=meaning)
  for option, owners in _options().items():
    meaning = '; '.join(f'{task}: {field.metadata["help"]}' for task, field in owners.items())
    kind = next(iter(owners.values())).metadata['range']
    parser.add_argument(f'--{option}', type=kind or str, help=meaning)
  parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
  return parser


@one_line
def main() -> None:
  """Prints the metrics, what they were measured on, and the checkpoint that was evaluated."""
  of_config = [argument for argument in sys.argv[1:] if argument.startswith('--config.')]
  given = _parser().parse_args([a for a in sys.argv[1:] if a not in of_config])
  text = overrides_from_args(of_config)
  asked = _chosen(given)
  windows = Windows(given.context, given.stride, given.max_tokens, given.batch)
  runtime.prepare()
  found = evaluate(given.workdir, asked, given.split, windows, text)
  for name, reason in found['left_out'].items():
    print(f'left out: {name} ({reason})', file=sys.stderr)
  if given.json:
    print(json.dumps(found, indent=2))
    return
  print(table(found['values']))
  print(
    '\n'.join(['', *_measured_on(found['cards']), f'{found["source"]}; {found["split"]} split'])
  )


if __name__ == '__main__':
  main()
