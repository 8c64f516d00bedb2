"""What packed formats cost: measured on a device, read from its file.

`measured/<kind of device>.json` (see `measure.device.kind`) was written there by `python -m
sparse_lm.format_costs`. Where there is no such file, that of `FALLBACK` is read: a model packed by the
costs of another device may run slower than it could, and computes the same.
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
  """The time of a product with one token, in the time that a byte of a dense kernel takes.

  A format that was not measured counts as a dense one of as many bytes.

  Attributes:
    slowdown: time of a stored byte that is read.
    fixed: time beside that of the bytes.
  """

  slowdown: float = 1.0
  fixed: float = 30e3


@dataclasses.dataclass(frozen=True)
class FormatCosts:
  """The costs of formats on a device.

  Attributes:
    source: the kind of device that they were measured on.
    by_name: of the formats that were measured.
  """

  source: str
  by_name: Mapping[str, FormatCost]

  def predicted(self, stored: Format, read: float = 1.0) -> float:
    """Time of a token that reads this share of a kernel, in the time of a dense kernel's byte."""
    cost = self.by_name.get(formats.name_of(stored), FormatCost())
    return stored.nbytes * cost.slowdown * read + cost.fixed


class _Cost(TypedDict):
  slowdown: float
  fixed: float


class _File(TypedDict):
  """The contents of a file: where it was measured, in words and versions, and the costs."""

  measured: dict[str, str | int]
  formats: dict[str, _Cost]


@functools.cache
def current() -> FormatCosts:
  """The costs on this process' device. Raises ValueError for a malformed file."""
  kind = device.kind()
  return read(kind if (FOLDER / f'{kind}.json').exists() else FALLBACK)


def read(kind: str) -> FormatCosts:
  """The costs that were measured on a kind of device. Raises ValueError for a malformed file."""
  values: _File = records.parse((FOLDER / f'{kind}.json').read_bytes(), _File)
  found = {name: FormatCost(**cost) for name, cost in values['formats'].items()}
  return FormatCosts(kind, found)


def write(
  path: pathlib.Path, measured: Mapping[str, str | int], by_name: Mapping[str, FormatCost]
) -> None:
  """Writes what `read` reads, rounded to what repeats when it is measured again."""
  rounded = {
    name: {'slowdown': float(f'{cost.slowdown:.2g}'), 'fixed': float(f'{cost.fixed:.2g}')}
    for name, cost in sorted(by_name.items())
  }
  path.write_text(json.dumps({'measured': dict(measured), 'formats': rounded}, indent=2) + '\n')
