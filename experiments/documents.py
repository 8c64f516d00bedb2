"""`python -m experiments.documents [NAME ...]`: writes README.md and docs/ from the lines of studies.

Every table, figure and quoted number of a study comes from one set of lines, docs/lines/<study>.jsonl.
A study that compares machines has one set for each device, docs/lines/<study>-<device>.jsonl. If names
are given, the lines of these studies are first copied from the folder of results. The prose is in
docs/templates, one Jinja template for each document. A template quotes a number as `{{
study('patterns').text('val_loss', scope='MLP', ...) }}` (see `findings`). It checks the claim of a
sentence with `{{ claim('neurons cost nothing', ...) }}`: the command fails if the lines refute the
claim. Text that quotes numbers is inside `{% filter bullets %}` (a list) or `{% filter paragraph %}`;
these filters wrap its lines again.
"""

import argparse
import functools
import json
import pathlib
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterable

import jinja2

from experiments import accelerator_report, loading
from experiments.findings import Findings
from experiments.study import Study
from sparse_lm import list_methods
from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core import records
from sparse_lm.core.errors import UserError
from sparse_lm.measure.device import file_name
from sparse_lm.report import results

# Studies that compare machines; their lines lie in one file for each device, `<study>-<device>.jsonl`.
MACHINES = ('accelerator', 'accelerator_all', 'accelerator_quick')
ROOT = pathlib.Path(__file__).resolve().parents[1]
LINES, TEMPLATES = ROOT / 'docs' / 'lines', ROOT / 'docs' / 'templates'
# Logs of single runs that a figure is drawn from: `dynamic_compute/runs/<run id>/metrics.jsonl`.
LOGS = '*/runs/*/metrics.jsonl'
# Fields that are not copied, because a run's command determines them or they name folders of its machine.
DROPPED = ('config', 'data', 'evaluation', 'causal', 'parent', 'pruned_from')


def take(name: str, folder: str) -> None:
  """Copies the lines of a finished study from a folder of results to docs/lines.

  Raises:
    UserError: there is no such study, or runs of it are missing. A study that compares machines may lack
      runs, but not all of them.
  """
  study = Study.load(name, folder)
  finished = list(study.finished().values())
  by_file: dict[str, list[results.Line]] = {}
  if name in MACHINES and finished:
    for line in finished:
      machine = file_name(line['env']['device'], line['env'].get('instruction_set', ''))
      by_file.setdefault(f'{name}-{machine}', []).append(line)
  else:
    by_file[name] = Findings(study).lines
  LINES.mkdir(parents=True, exist_ok=True)
  for log in LINES.glob(LOGS):
    if (newer := pathlib.Path(folder) / log.relative_to(LINES)).exists():
      shutil.copy(newer, log)
  for stem, lines in by_file.items():
    kept = [_portable(line, folder) for line in lines]
    text = ''.join(json.dumps(records.seal(line)) + '\n' for line in kept)
    (LINES / f'{stem}.jsonl').write_text(text)


def machines(folder: pathlib.Path, name: str) -> str:
  """Returns the tables of a study that compares machines, for all devices, and draws its figure."""
  files = sorted(LINES.glob(f'{name}-*.jsonl'))
  lines = [line for file in files for line in results.read_file(file)]
  return accelerator_report.page(lines, folder / name).strip() if lines else 'Not measured yet.'


def on_machine(name: str, machine: str) -> dict[str, results.Line]:
  """Returns the lines of a study on one machine, by row; `machine` is spelt as in the file's name."""
  lines = results.read_file(LINES / f'{name}-{machine}.jsonl')
  return {line['labels']['row']: line for line in lines}


def _portable(line: results.Line, folder: str) -> results.Line:
  """Returns a line without `DROPPED` fields; its command names `results` as the folder of results."""
  kept = {key: value for key, value in line.items() if key not in DROPPED}
  here = rf'=(?:{re.escape(str(pathlib.Path(folder)))})(?=[/ ])'
  return kept | {'command': re.sub(here, '=results', line['command'])}


def documents(folder: pathlib.Path) -> dict[pathlib.Path, str]:
  """Returns the contents of every document by its path, made from docs/lines and docs/templates.

  Args:
    folder: where studies write their tables and figures.

  Raises:
    UserError: lines are missing, a template is malformed, or lines refute a claim.
  """
  for file in LINES.glob('*.jsonl'):
    target = folder / file.stem / 'runs.jsonl'
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)
  for log in LINES.glob(LOGS):
    target = folder / log.relative_to(LINES)
    if not target.exists():  # a newer log may come from the folder of results
      target.parent.mkdir(parents=True)
      shutil.copy(log, target)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
  )
  # Each study is read once, however many documents quote it.
  study = functools.cache(lambda name: Findings(Study.load(name, folder)))
  environment.globals |= {'study': study, 'methods': list_methods.table, 'claim': claim}
  environment.globals |= {'title': title, 'questions': loading.questions()}
  environment.globals |= {'machines': functools.partial(machines, folder), 'on_machine': on_machine}
  environment.filters |= {'bullets': bullets, 'paragraph': paragraph}
  found = {}
  for name in sorted(environment.list_templates()):
    try:
      text = environment.get_template(name).render()
    except (jinja2.TemplateError, UserError) as error:
      raise UserError(f'docs/templates/{name}: {error}') from error
    found[ROOT / name if name == 'README.md' else ROOT / 'docs' / name] = text
  return found


def title(page: str) -> str:
  """Returns the heading of a page of results, read from its template."""
  heading, _, _ = (TEMPLATES / 'results' / f'{page}.md').read_text(encoding='utf-8').partition('\n')
  return heading.removeprefix('# ')


def claim(statement: str, holds: bool) -> str:
  """Returns an empty text if the statement holds. Raises UserError if it does not."""
  if not holds:
    raise UserError(f'the lines refute {statement!r}; valid: a sentence that they support')
  return ''


def bullets(text: str) -> str:
  """Wraps the lines of a Markdown list."""
  items = re.split(r'^- ', text.strip(), flags=re.MULTILINE)[1:]
  return '\n'.join(_filled(item, initial_indent='- ', subsequent_indent='  ') for item in items)


def paragraph(text: str) -> str:
  """Wraps the lines of a paragraph."""
  return _filled(text)


def _filled(text: str, **indents: str) -> str:
  whole = {'break_long_words': False, 'break_on_hyphens': False}
  return textwrap.fill(' '.join(text.split()), 110, **indents, **whole)


def _figures(folder: pathlib.Path, texts: Iterable[str]) -> dict[pathlib.Path, pathlib.Path]:
  """Returns the figures of studies that documents show, each with its path in docs/results."""
  shown = ' '.join(texts)
  drawn = (figure for figure in folder.glob('*/*.png') if figure.name in shown)
  return {figure: ROOT / 'docs' / 'results' / figure.name for figure in drawn}


def write(names: list[str], folder: str) -> list[pathlib.Path]:
  """Copies the lines of `names` from a folder of results, then writes all documents and figures.

  Returns the paths that it wrote.
  """
  for name in names:
    take(name, folder)
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    for name in names:
      # Figures of router health are drawn from the logs of single runs, next to the lines.
      if (runs := Study.load(name, folder).folder / 'runs').is_dir():
        (root / name).mkdir()
        (root / name / 'runs').symlink_to(runs.resolve())
    contents = documents(root)
    for path, text in contents.items():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text, encoding='utf-8')
    figures = _figures(root, contents.values())
    for figure, path in figures.items():
      path.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(figure, path)
  return [*contents, *figures.values()]


@one_line
def main() -> None:
  """Writes the documents and prints their paths."""
  parser = Parser('python -m experiments.documents')
  parser.add_argument(
    'names', nargs='*', help='studies whose lines are first copied from --results'
  )
  parser.add_argument(
    '--results', type=local_path, default='results', help="folder of all studies' results"
  )
  arguments: argparse.Namespace = parser.parse_args()
  for path in write(arguments.names, arguments.results):
    print(f'wrote {path.relative_to(ROOT)}', file=sys.stderr)


if __name__ == '__main__':
  main()
