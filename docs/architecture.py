"""The diagram and the table of packages on the architecture page, drawn from the imports."""

import ast
import functools
import itertools
import pathlib

from matplotlib import patches
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'sparse_lm'
# The modules that `python -m` runs: those at the top of the package, and these.
ENTRIES = 'entry points'
INNER_ENTRIES = (
  'sparse_lm.convert.__main__',
  'sparse_lm.data.prepare',
  'sparse_lm.train.__main__',
  'sparse_lm.report.__main__',
)
WIDTH, HEIGHT, GAP_X, GAP_Y = 1.55, 0.62, 0.3, 0.62


def folder_of(module: str) -> str:
  """The folder of `sparse_lm.<folder>.…`, or `ENTRIES` for a module that `python -m` runs."""
  parts = module.split('.')
  inside = (PACKAGE / parts[1]).is_dir() and module not in INNER_ENTRIES
  return parts[1] if inside else ENTRIES


@functools.cache
def imports() -> dict[str, set[str]]:
  """The folders that each folder of the package imports."""
  found: dict[str, set[str]] = {}
  for path in sorted(PACKAGE.rglob('*.py')):
    module = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    here = found.setdefault(folder_of(module), set())
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f'{node.module}.{alias.name}' for alias in node.names]
      else:
        continue
      here.update(folder_of(name) for name in names if name.startswith('sparse_lm.'))
  return {name: others - {name, ENTRIES} for name, others in found.items()}


def level(name: str) -> int:
  """The length of the longest chain of imports below a folder."""
  return 1 + max((level(other) for other in imports()[name]), default=-1)


def reachable(name: str) -> set[str]:
  """Every folder that a folder imports, directly or through others."""
  return set().union(*({other} | reachable(other) for other in imports()[name]))


@functools.cache
def arrows() -> list[tuple[str, str]]:
  """The imports that no chain of other imports implies."""
  return [
    (name, other)
    for name, others in imports().items()
    for other in sorted(others)
    if not any(other in reachable(between) for between in others)
  ]


def files(name: str) -> int:
  """The number of Python files of a folder that hold code."""
  folder = PACKAGE.glob('*.py') if name == ENTRIES else (PACKAGE / name).rglob('*.py')
  return sum(path.name != '__init__.py' for path in folder)


def rows() -> list[list[str]]:
  """The folders by row, from the lowest, each just below the lowest folder that imports it."""
  found: dict[str, int] = {}
  for name in sorted(imports(), key=level, reverse=True):
    above = [found[other] for other in found if name in imports()[other]]
    found[name] = min(above) - 1 if above else level(name)
  return [sorted(n for n in found if found[n] == i) for i in range(max(found.values()) + 1)]


def centres(order: tuple[tuple[str, ...], ...]) -> dict[str, tuple[float, float]]:
  """The centre of each folder's box."""
  return {
    name: ((i - (len(row) - 1) / 2) * (WIDTH + GAP_X), y * (HEIGHT + GAP_Y))
    for y, row in enumerate(order)
    for i, name in enumerate(row)
  }


def crossing(order: tuple[tuple[str, ...], ...]) -> float:
  """Boxes that arrows cross, then the width that arrows span: what the best order has least of."""
  centre, total = centres(order), 0.0
  for start, end in arrows():
    (x0, y0), (x1, y1) = centre[start], centre[end]
    total += abs(x1 - x0)
    for x, y in centre.values():
      if y1 < y < y0:
        across = x0 + (x1 - x0) * (y0 - y) / (y0 - y1)
        total += 100 * (abs(across - x) < WIDTH / 2 + 0.1)
  return total


def draw(path: pathlib.Path) -> None:
  """Draws the diagram: entry points at the top, and arrows from a folder to what it imports."""
  orders = itertools.product(*map(itertools.permutations, rows()))
  centre = centres(min(orders, key=crossing))
  figure = Figure(figsize=(7.2, 0.78 * len(rows())), layout='constrained')
  axes = figure.subplots()
  for start, end in arrows():
    (x0, y0), (x1, y1) = centre[start], centre[end]
    arrow = {'arrowstyle': '-|>', 'color': '0.45', 'linewidth': 0.9, 'shrinkA': 0, 'shrinkB': 0}
    axes.annotate('', (x1, y1 + HEIGHT / 2), (x0, y0 - HEIGHT / 2), arrowprops=arrow)
  for name, (x, y) in centre.items():
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    style = {'facecolor': '#dce9f5', 'edgecolor': '0.3', 'zorder': 3}
    box = patches.FancyBboxPatch(corner, WIDTH, HEIGHT, 'round,pad=0,rounding_size=0.08', **style)
    axes.add_patch(box)
    axes.text(x, y + 0.1, name, ha='center', va='center', fontsize=9, weight='bold', zorder=4)
    below = f'{files(name)} files'
    axes.text(x, y - 0.17, below, ha='center', va='center', fontsize=7.5, zorder=4)
  axes.set_aspect('equal')
  axes.autoscale_view()
  axes.margins(0.02)
  axes.axis('off')
  figure.savefig(path, facecolor='white')


def table() -> str:
  """A Markdown table of the folders: what each holds, and the folders that it imports."""
  lines = ['| folder | what it holds | imports |', '|---|---|---|']
  for name in sorted(imports(), key=lambda name: (-level(name), name)):
    others = ', '.join(f'`{other}`' for other in sorted(imports()[name])) or 'nothing'
    lines.append(f'| {_link(name)} | {_summary(name)} | {others} |')
  return '\n'.join(lines) + '\n'


def _link(name: str) -> str:
  return name if name == ENTRIES else f'`{name}`'


def _summary(name: str) -> str:
  path = PACKAGE / '__init__.py' if name == ENTRIES else PACKAGE / name / '__init__.py'
  docstring = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
  return ' '.join(docstring.partition('\n\n')[0].split())
