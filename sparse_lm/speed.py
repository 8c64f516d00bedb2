"""`python -m sparse_lm.speed --workdir=FOLDER`: times packed models beside their dense twins."""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import Range
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.speed import Speed
from sparse_lm.inference.pack import PackedModel, dense_twin, pack
from sparse_lm.report.results import machine
from sparse_lm.runs import packed_folder, runtime, trained
from sparse_lm.runs.environment import environment
from sparse_lm.runs.setup import data_of

# The measurements of a model, and its source.
Row = dict[str, float | int | str | None]


class Candidate(NamedTuple):
  """A packed model to time, with the config and the tokenizer of its run."""

  packed: PackedModel
  config: ConfigDict
  tokenizer: Tokenizer
  source: str


def candidate_of(path: str) -> Candidate:
  """Loads a packed folder, or loads a workdir and packs its model in memory.

  Raises UserError if the folder holds no model.
  """
  if packed_folder.is_saved(path):
    found = packed_folder.load(path)
    return Candidate(found.packed, found.config, found.tokenizer, found.source)
  run = trained.load(path)
  packed = pack(run.program.model, run.params, run.masks, run.model_state)
  return Candidate(packed, run.config, run.tokenizer, run.source)


def speed(paths: list[str], batch: int = 1, repeats: int = 15) -> dict[str, Row]:
  """Times models and their dense twins in turns, on the validation text of the first model.

  Args:
    paths: workdirs or packed folders.
    batch: sequences that are decoded together.
    repeats: number of turns.

  Returns:
    For each path its measurements (see `evals.speed.Speed`) and its `source` (the folder and the
    checkpoint, in words).

  Raises:
    UserError: a folder without a model, models of different tokenizers or contexts, or too little text.
  """
  found = {path: candidate_of(path) for path in paths}
  config, tokenizer = found[paths[0]].config, found[paths[0]].tokenizer
  for path, other in found.items():
    same_tokens = other.tokenizer.digest == tokenizer.digest
    if not same_tokens or other.config.data.context != config.data.context:
      raise UserError(
        f'--workdir={path} has another tokenizer or context than {paths[0]}; valid: models that read '
        'the same tokens, or one command for each'
      )
  data = data_of(config)
  if data.tokenizer.digest != tokenizer.digest:
    raise UserError(
      f'--workdir={paths[0]} was trained on other tokens than config.data now makes of its text; valid: '
      'the text that it was trained on'
    )
  text = np.asarray(data.tokens['validation'])
  models = {
    path: EvalModel.of_packed(one.packed, dense_twin(one.packed.model))
    for path, one in found.items()
  }
  measured = Speed(repeats).compare(models, EvalData(text, config.data.context, batch))
  return {path: row | {'source': found[path].source} for path, row in measured.items()}


ROWS = (
  ('decode (ms/token)', 'decode_ms', '.3f', 1),
  ('prefill (tokens/s)', 'prefill_tokens_per_second', ',.0f', 1),
  ('weights kept', 'kept_weights', '.2%', 1),
  ('weights (MB)', 'weights_bytes', '.2f', 1e-6),
  ('read per token (MB)', 'read_bytes', '.2f', 1e-6),
  ('cache read per token (MB)', 'cache_bytes', '.2f', 1e-6),
  ('share of the bandwidth', 'bandwidth', '.0%', 1),
  ('peak memory (MB)', 'peak_memory', '.1f', 1e-6),
)


def table(found: dict[str, Row]) -> str:
  """Returns a Markdown table. The row of each packed model is followed by that of its dense twin."""
  rows = []
  for path, row in found.items():
    for role, name in (('', path), ('dense_', 'its dense twin')):
      cells = [
        '-' if row[role + key] is None else format(row[role + key] * scale, form)
        for _, key, form, scale in ROWS
      ]
      ratios = ['1', '1'] if role else [_ratio(row, 'decode'), _ratio(row, 'prefill')]
      rows.append([name, *cells, *ratios])
  header = ['model', *(title for title, *_ in ROWS), 'decode, × dense', 'prefill, × dense']
  return tabulate(rows, header, tablefmt='github', disable_numparse=True)


def _ratio(row: Row, what: str) -> str:
  low, mid, high = (row[f'{what}_speedup{end}'] for end in ('_low', '', '_high'))
  return f'{mid:.2f} ({low:.2f}–{high:.2f})'


@one_line
def main() -> None:
  """Prints the table, and the device that it was measured on."""
  parser = Parser('python -m sparse_lm.speed')
  parser.add_argument(
    '--workdir', type=local_path, required=True, action='append', help='workdir or packed folder'
  )
  parser.add_argument('--batch', type=Range(int, '[1, 2^24]'), default=1, help='batch size')
  parser.add_argument('--repeats', type=Range(int, '[1, 2^31)'), default=15, help='number of turns')
  arguments = parser.parse_args()
  runtime.prepare()
  found = speed(arguments.workdir, arguments.batch, arguments.repeats)
  print(table(found), end='\n\n')
  for row in found.values():
    print(row['source'])
  peak = next(iter(found.values()))['memory_bandwidth'] / 1e9
  print(
    f'\nBatch {arguments.batch}; {machine(environment())}; memory reads at {peak:.1f} GB/s. Times are '
    f'medians of {arguments.repeats} turns, with quartiles in brackets. Dense twins have random weights.'
  )


if __name__ == '__main__':
  main()
