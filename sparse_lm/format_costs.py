"""`python -m sparse_lm.format_costs`: measures the speed of the packed formats on this device."""

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
  """Measures the costs of all formats, writes them to a file and prints them."""
  parser = Parser('python -m sparse_lm.format_costs')
  parser.add_argument('--out', type=local_path, help='JSON file; default: the file of this device')
  parser.add_argument(
    '--repeats', type=Range(int, '[1, 2^31)'), default=15, help='number of turns per timing'
  )
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
  header = ('format', 'time per byte (× dense)', 'fixed time per product (dense kB)')
  print(tabulate(rows, header, tablefmt='github', floatfmt='.2f'))
  print(f'\nThe unit of time is that of reading a dense byte or kilobyte. Written to {path}')


if __name__ == '__main__':
  main()
