"""Which numbers a field may hold, stated beside the field and checked before anything is built.

A method states the range of a field with its default: `density: float = ranged(0.125, '(0, 1]')`. The
fields that every config has get their defaults in `configs/base.py`, which the package does not import;
their ranges stand here, and a test compares the two. `runs/configs.check` applies all of them.
"""

import argparse
import dataclasses
import math
import re
from typing import TypeVar

import numpy as np

from sparse_lm.core.errors import UserError

Number = TypeVar('Number', int, float)
Default = TypeVar('Default')
# The value of a field of a config.
FieldValue = bool | int | float | str | tuple['FieldValue', ...]

_NUMBER = r'(-?[\d.]+(?:e-?\d+)?|2\^\d+|inf)'
_INTERVAL = re.compile(rf'(0 or )?([\[(]){_NUMBER}, {_NUMBER}([\])])')


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval of numbers; of a tuple, the interval that every element lies in.

  A float is compared as float32, which training computes in: 0.99999999 is 1 there. Infinity and NaN
  lie in no range.

  Attributes:
    kind: `int` or `float`; an int passes for a float, and a bool for neither.
    interval: in the usual notation, such as '(0, 1]', '[1, 2^31)' or '0 or [0.1, inf)'.
  """

  kind: type
  interval: str

  def __post_init__(self) -> None:
    if not _INTERVAL.fullmatch(self.interval):
      raise ValueError(f'{self.interval!r} is no interval such as (0, 1] or [1, 2^31)')

  def __str__(self) -> str:
    return f'{"a whole number" if self.kind is int else "a float32 number"} in {self.interval}'

  @property
  def ends(self) -> tuple[float, float]:
    """Both ends, as the field's own type (an infinite end stays a float)."""
    return tuple(self._end(text) for text in _INTERVAL.fullmatch(self.interval).group(3, 4))

  def _end(self, text: str) -> float:
    if text == 'inf':
      return math.inf
    base, _, power = text.partition('^')
    return self.kind(base) ** int(power or 1)

  def holds(self, value: object) -> bool:
    """Whether `value` is a number of the right type in the interval."""
    if isinstance(value, tuple | list):
      return all(map(self.holds, value))
    if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
      return False
    low, high = self.ends
    if self.kind is float:
      value, low, high = map(_single, (value, low, high))
      if not math.isfinite(value):
        return False
    zero, opens, *_, closes = _INTERVAL.fullmatch(self.interval).groups()
    above = low <= value if opens == '[' else low < value
    below = value <= high if closes == ']' else value < high
    return (above and below) or (bool(zero) and value == 0)

  def require(self, field: str, value: object) -> None:
    """Raises UserError, naming the field and the range, unless `value` lies in it."""
    if not self.holds(value):
      raise UserError(f'{field}={shown(value)} is not valid; valid: {self}')

  def __call__(self, text: str) -> int | float:
    """The number that a command-line argument spells: this is a `type` for `add_argument`."""
    try:
      value = self.kind(text)
    except ValueError:
      value = None
    if not self.holds(value):
      raise argparse.ArgumentTypeError(f'{text!r} is not valid; valid: {self}')
    return value


def ranged(default: Number, interval: str, traced: bool = False) -> Number:
  """A dataclass field of that default whose range is `interval`, of the default's type.

  Args:
    traced: whether a training step uses the number in arithmetic alone, so that it may be a traced scalar
      there: runs that differ in such numbers alone can be packed into one program.
  """
  metadata = {'range': Range(type(default), interval), 'traced': traced}
  return dataclasses.field(default=default, metadata=metadata)


def sliced(field: str, text: str, count: int) -> range:
  """Those of `count` layers that a Python slice, such as '1::2', names.

  Raises UserError, naming the field, where the text is no slice, or names none of them.
  """
  try:
    parts = [int(part) if part.strip() else None for part in text.split(':')]
    if len(parts) not in (2, 3):
      raise ValueError
    chosen = range(count)[slice(*parts)]
  except ValueError:
    raise UserError(f"{field}={text!r} is not a slice such as ':' or '1::2'") from None
  if not chosen:
    raise UserError(f'{field}={text!r} matches none of the {count} layers; valid: 0 to {count - 1}')
  return chosen


def supplied(default: Default) -> Default:
  """A dataclass field that whoever builds the method fills in: it has a default and is no config key."""
  return dataclasses.field(default=default, kw_only=True, metadata={'supplied': True})


def of_fields(cls: type) -> dict[str, Range]:
  """The ranges that the fields of a dataclass state, by field name."""
  return {f.name: f.metadata['range'] for f in dataclasses.fields(cls) if 'range' in f.metadata}


def traced() -> dataclasses.Field:
  """A dataclass field without a default that may be a traced scalar, see `ranged`."""
  return dataclasses.field(metadata={'traced': True})


def traced_fields(cls: type) -> list[str]:
  """The fields of a dataclass that may be traced scalars."""
  return [f.name for f in dataclasses.fields(cls) if f.metadata.get('traced')]


def _single(value: float) -> float:
  """`value` as float32 rounds it, infinite beyond its largest number."""
  try:
    with np.errstate(over='ignore'):
      return float(np.float32(value))
  except OverflowError:  # an int too large for any float
    return math.inf


def shown(value: object) -> str:
  """`value` as a message quotes it; Python refuses to print ints of thousands of digits."""
  if isinstance(value, int) and value.bit_length() > 100:
    return f'(an integer of about {round(value.bit_length() * math.log10(2))} digits)'
  return repr(value)


_COUNT = Range(int, '[1, 2^31)')
_FRACTION = Range(float, '[0, 1]')
_DECAY = Range(float, '[0, 1)')
_AMOUNT = Range(float, '[0, inf)')

# The numeric fields of `configs/base.py`. Sizes end where no machine could hold the arrays; there are
# at most 256 layers, because each is traced and compiled by itself wherever layers are not scanned, such
# as on a CPU.
SHARED = {
  'seed': Range(int, '[0, 2^31)'),
  'data.split': _FRACTION,
  'data.vocab_size': Range(
    int, '[257, 65535]'
  ),  # the bytes and a merge; tokens are stored in 16 bits
  'data.context': Range(int, '[1, 2^24]'),
  'data.batch': Range(int, '[1, 2^24]'),
  'model.layers': Range(int, '[1, 256]'),
  'model.width': Range(int, '[1, 2^20]'),
  'model.hidden': Range(int, '[1, 2^24]'),
  'model.heads': Range(int, '[1, 2^16]'),
  'model.kv_heads': Range(int, '[1, 2^16]'),
  'model.dropout': _DECAY,
  'weight.sparsity': Range(float, '[0, 1)'),
  'budget.target': Range(float, '(0, 1]'),
  'budget.weight': _AMOUNT,
  'budget.rate': _AMOUNT,
  'distill.weight': _FRACTION,
  'distill.temperature': Range(float, '[0.0001, 10000]'),
  'optimizer.learning_rate': _AMOUNT,
  'optimizer.warmup': _FRACTION,
  'optimizer.final': _FRACTION,
  'optimizer.momentum': _DECAY,
  'optimizer.b2': _DECAY,
  'optimizer.eps': Range(float, '(0, inf)'),
  'optimizer.weight_decay': _AMOUNT,
  'optimizer.clip': _AMOUNT,
  'optimizer.ema': _DECAY,
  'train.steps': _COUNT,
  'train.accumulation': _COUNT,
  'train.log_every': _COUNT,
  'train.eval_every': _COUNT,
  'train.checkpoint_every': _COUNT,
}
