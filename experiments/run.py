"""`python -m experiments.run STUDY`: trains the runs that a study lacks, then prints its table.

STUDY is a module of this package, such as `patterns`, or the path of a Python file, such as
`my_studies/depth.py`. Either one defines

- a docstring whose first line is the question that the study answers,
- `runs() -> list[Run]` (see `sweep`), in the order of the rows in the table,
- `report(lines, folder) -> str`, which writes tables and figures into the folder and returns Markdown.

`comparison.Comparison` provides both functions for a study of methods at several sparsities over seeds.
A run trains a model. A run that does something else names a function, `Run(..., execute)`.

Results go to `<results>/<name of the module>`. The same command continues an interrupted study. Several
processes can work on one study: each takes runs that no other process works on. A run that diverges is
recorded as diverged, `report` gets nan for its metrics, and the other runs go on. Such a run is trained
again with `--only=RUN_ID`, or once its line is removed from runs.jsonl.

`--pack` trains runs that differ in seed, sparsity, learning rate, weight decay or penalty as one
program on an accelerator, as many runs as fit its memory. `--pack=N` packs at most N runs, on a CPU
too. Every run keeps its own folder and line. `--dry_run` shows the packs.
"""

import argparse
import sys

from experiments import loading
from experiments.study import Study
from experiments.sweep import Run
from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.ranges import Range


@one_line
def main() -> None:
  """Lists the studies, lists the missing runs of one, or trains these and prints the study's table."""
  arguments = _arguments()
  if arguments.list:
    for name, question in loading.questions().items():
      print(f'{name}: {question}')
    return
  study = Study.load(arguments.study, arguments.results)
  again = bool(arguments.only)
  runs = study.only(arguments.only) if again else study.shard(arguments.index, arguments.num_shards)
  if arguments.dry_run:
    _list_missing(study, runs, study.missing(runs, again), arguments.pack)
    return
  if skipped := study.train(runs, again, arguments.pack):
    print(f'skipped {skipped} of {len(runs)} runs: other processes work on them', file=sys.stderr)
  print(study.report())


def _list_missing(
  study: Study, runs: dict[str, Run], missing: dict[str, Run], pack: int | None
) -> None:
  """Prints the commands of the missing runs, grouped by pack; a wrong config is refused before."""
  configs = study.configs(missing)
  print(f'# {len(runs) - len(missing)} of {len(runs)} runs are finished; missing:')
  if pack is None:
    for run_id in missing:
      print(study.command(run_id))
    return
  from experiments import packing

  for job in packing.plan(missing, configs, pack):
    print(f'# {job.title}')
    for run_id in job.runs:
      print(study.command(run_id))


def _arguments() -> argparse.Namespace:
  parser = Parser('python -m experiments.run')
  parser.add_argument(
    'study', nargs='?', type=local_path, help='name of a study, or path of its Python file'
  )
  parser.add_argument(
    '--results', type=local_path, default='results', help="folder of all studies' results"
  )
  parser.add_argument(
    '--only', metavar='RUN_ID', help='run only the run of this id, even if it diverged before'
  )
  parser.add_argument('--list', action='store_true', help='list the studies of this package')
  parser.add_argument('--dry_run', action='store_true', help='list the missing runs and stop')
  parser.add_argument(
    '--pack',
    nargs='?',
    const=0,
    type=Range(int, '[2, 2^31)'),
    metavar='N',
    help='train at most N runs as one program; without N, as many as fit the accelerator',
  )
  parser.add_argument(
    '--index', type=Range(int, '[0, 2^31)'), default=0, help='number of this shard, from 0'
  )
  parser.add_argument(
    '--num_shards', type=Range(int, '[1, 2^31)'), default=1, help='number of shards of the study'
  )
  arguments = parser.parse_args()
  if not arguments.study and not arguments.list:
    parser.error('name a study, or ask for --list')
  return arguments


if __name__ == '__main__':
  main()
