"""`python -m sparse_lm.format_costs`: measures what packed formats cost on this device."""

import pathlib

import jax
from tabulate import tabulate

from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import writing
from sparse_lm.core.ranges import Range
from sparse_lm.inference import costs, time_formats
from sparse_lm.measure import device
from sparse_lm.runs import runtime


@one_line
def main() -> None:
  """Measures, writes the file and prints what it holds."""
  parser = Parser('python -m sparse_lm.format_costs')
  parser.add_argument('--out', type=local_path, help='a JSON file; by default that of this device')
  parser.add_argument('--repeats', type=Range(int, '[1, 2^31)'), default=15, help='turns of a case')
  arguments = parser.parse_args()
  runtime.prepare()
  path = arguments.out or str(costs.FOLDER / f'{device.kind()}.json')
  found = time_formats.measure(arguments.repeats)
  here = {'device': jax.devices()[0].device_kind, 'jax': jax.__version__}
  here |= {'dtype': time_formats.dtype().name}
  if jax.default_backend() == 'cpu':
    here |= device.processor()
  with writing(path):
    costs.write(pathlib.Path(path), here, found)
  rows = [(name, cost.slowdown, cost.fixed / 1e3) for name, cost in found.items()]
  header = ('format', 'time of a byte', 'of a product (dense kB)')
  print(tabulate(rows, header, tablefmt='github', floatfmt='.2f'))
  print(f'\nin the time of a dense byte; written to {path}')


if __name__ == '__main__':
  main()
