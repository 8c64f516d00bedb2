"""Costs of packed formats, which are measured per kind of device and read from a file.

`python -m sparse_lm.format_costs` writes `measured/<kind of device>.json` (see `measure.device.kind`).
If there is no file for a device, that of `FALLBACK` is used. A model that was packed with the costs of
another device computes the same, but may be slower than possible.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import TypedDict

from sparse_lm.core import records
from sparse_lm.core.format import Format
from sparse_lm.inference import formats
from sparse_lm.measure import device

FOLDER = pathlib.Path(__file__).parent / 'measured'
FALLBACK = 'cpu-avx-512'


@dataclasses.dataclass(frozen=True)
class FormatCost:
  """The cost of a product with one token, in units of the time per byte of a dense kernel.

  The defaults, for formats that were not measured, are those of a dense kernel.

  Attributes:
    slowdown: time per byte that is read.
    fixed: time per product, independent of its size.
  """

  slowdown: float = 1.0
  fixed: float = 30e3


@dataclasses.dataclass(frozen=True)
class FormatCosts:
  """The costs of formats on a device.

  Attributes:
    source: kind of the device on which they were measured.
    by_name: the costs by the name of the format.
  """

  source: str
  by_name: Mapping[str, FormatCost]

  def predicted(self, stored: Format, read: float = 1.0) -> float:
    """Returns the predicted time of a token that reads the fraction `read` of a kernel (`FormatCost`)."""
    cost = self.by_name.get(formats.name_of(stored), FormatCost())
    return stored.nbytes * cost.slowdown * read + cost.fixed


class _Cost(TypedDict):
  slowdown: float
  fixed: float


class _File(TypedDict):
  """The contents of a file: how and where it was measured, and the costs."""

  measured: dict[str, str | int]
  formats: dict[str, _Cost]


@functools.cache
def current() -> FormatCosts:
  """Returns the costs on this device. Raises a ValueError if the file is malformed."""
  kind = device.kind()
  return read(kind if (FOLDER / f'{kind}.json').exists() else FALLBACK)


def read(kind: str) -> FormatCosts:
  """Reads the costs of a kind of device. Raises a ValueError if the file is malformed."""
  values: _File = records.parse((FOLDER / f'{kind}.json').read_bytes(), _File)
  found = {name: FormatCost(**cost) for name, cost in values['formats'].items()}
  return FormatCosts(kind, found)


def write(
  path: pathlib.Path, measured: Mapping[str, str | int], by_name: Mapping[str, FormatCost]
) -> None:
  """Writes a file for `read`, rounded to the digits that are reproducible."""
  rounded = {
    name: {'slowdown': float(f'{cost.slowdown:.2g}'), 'fixed': float(f'{cost.fixed:.2g}')}
    for name, cost in sorted(by_name.items())
  }
  path.write_text(json.dumps({'measured': dict(measured), 'formats': rounded}, indent=2) + '\n')
