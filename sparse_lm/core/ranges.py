"""Valid ranges of numeric config fields, checked before a model is built.

A method declares the range of a field together with its default:
`density: float = ranged(0.125, '(0, 1]')`. The fields of `configs/base.py` have their ranges in this
file, because the package does not import `configs`; a test checks that no field is missing.
`runs/configs.check` applies all ranges.
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
# The value of a config field.
FieldValue = bool | int | float | str | tuple['FieldValue', ...]

_NUMBER = r'(-?[\d.]+(?:e-?\d+)?|2\^\d+|inf)'
_INTERVAL = re.compile(rf'(0 or )?([\[(]){_NUMBER}, {_NUMBER}([\])])')


@dataclasses.dataclass(frozen=True)
class Range:
  """The interval of valid numbers of a field. If the field is a tuple, every element must lie in it.

  A float is rounded to float32 before the comparison, because training computes in float32, where
  0.99999999 is 1. Infinity and NaN are never valid.

  Attributes:
    kind: `int` or `float`. `float` fields also accept an int. A bool is never accepted.
    interval: in interval notation, such as '(0, 1]', '[1, 2^31)' or '0 or [0.1, inf)'.
  """

  kind: type
  interval: str

  def __post_init__(self) -> None:
    if not _INTERVAL.fullmatch(self.interval):
      raise ValueError(f'{self.interval!r} is not an interval such as (0, 1] or [1, 2^31)')

  def __str__(self) -> str:
    return f'{"a whole number" if self.kind is int else "a float32 number"} in {self.interval}'

  @property
  def ends(self) -> tuple[float, float]:
    """Both ends of the interval, in the field's type (an infinite end is a float)."""
    return tuple(self._end(text) for text in _INTERVAL.fullmatch(self.interval).group(3, 4))

  def _end(self, text: str) -> float:
    if text == 'inf':
      return math.inf
    base, _, power = text.partition('^')
    return self.kind(base) ** int(power or 1)

  def holds(self, value: object) -> bool:
    """Returns whether `value` has the right type and lies in the interval."""
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
    """Raises a UserError that names the field and the range, unless `value` is valid."""
    if not self.holds(value):
      raise UserError(f'{field}={shown(value)} is not valid; valid: {self}')

  def __call__(self, text: str) -> int | float:
    """Parses a command-line argument: a `Range` can be the `type` of `add_argument`."""
    try:
      value = self.kind(text)
    except ValueError:
      value = None
    if not self.holds(value):
      raise argparse.ArgumentTypeError(f'{text!r} is not valid; valid: {self}')
    return value


def ranged(default: Number, interval: str, traced: bool = False) -> Number:
  """Returns a dataclass field with a default and a range of the default's type.

  Args:
    default: default value.
    interval: the valid interval, as in `Range`.
    traced: whether the number may be a traced scalar in the training step, which then uses it only in
      arithmetic. Runs that differ only in such numbers can be packed into one program.
  """
  metadata = {'range': Range(type(default), interval), 'traced': traced}
  return dataclasses.field(default=default, metadata=metadata)


def layer_slice(field: str, text: str, count: int) -> range:
  """Returns the indices that a Python slice, such as '1::2', selects among `count` layers.

  Args:
    field: name of the config field, for the error message.
    text: the slice.
    count: number of layers.

  Raises:
    UserError: the text is not a slice, or selects no layer.
  """
  try:
    parts = [int(part) if part.strip() else None for part in text.split(':')]
    if len(parts) not in (2, 3):
      raise ValueError
    chosen = range(count)[slice(*parts)]
  except ValueError:
    raise UserError(f"{field}={text!r} is not a slice; valid: for example ':' or '1::2'") from None
  if not chosen:
    raise UserError(f'{field}={text!r} selects none of the {count} layers; valid: 0 to {count - 1}')
  return chosen


def supplied(default: Default) -> Default:
  """Returns a dataclass field that is not a config key: the code that builds the method sets it."""
  return dataclasses.field(default=default, kw_only=True, metadata={'supplied': True})


def of_fields(cls: type) -> dict[str, Range]:
  """Returns the ranges of a dataclass' fields, by field name."""
  return {f.name: f.metadata['range'] for f in dataclasses.fields(cls) if 'range' in f.metadata}


def traced() -> dataclasses.Field:
  """Returns a dataclass field without a default that may be a traced scalar (see `ranged`)."""
  return dataclasses.field(metadata={'traced': True})


def traced_fields(cls: type) -> list[str]:
  """Returns the names of a dataclass' fields that may be traced scalars."""
  return [f.name for f in dataclasses.fields(cls) if f.metadata.get('traced')]


def _single(value: float) -> float:
  """Rounds `value` to float32; values beyond its largest number become infinite."""
  try:
    with np.errstate(over='ignore'):
      return float(np.float32(value))
  except OverflowError:  # an int too large for any float
    return math.inf


def shown(value: object) -> str:
  """Returns `value` for an error message; Python refuses to print ints of thousands of digits."""
  if isinstance(value, int) and value.bit_length() > 100:
    return f'(an integer of about {round(value.bit_length() * math.log10(2))} digits)'
  return repr(value)


_COUNT = Range(int, '[1, 2^31)')
_FRACTION = Range(float, '[0, 1]')
_DECAY = Range(float, '[0, 1)')
_AMOUNT = Range(float, '[0, inf)')

# The numeric fields of `configs/base.py`. Sizes are limited to arrays that some machine could hold. The
# limit is 256 layers, because without a scan over layers, as on a CPU, each layer is traced and compiled
# separately.
BASE_FIELDS = {
  'seed': Range(int, '[0, 2^31)'),
  'data.split': _FRACTION,
  # bpe needs 257 to 65535, the bytes and a merge; an imported model has any number.
  'data.vocab_size': Range(int, '[1, 2^24]'),
  'data.context': Range(int, '[1, 2^24]'),
  'data.batch': Range(int, '[1, 2^24]'),
  'model.layers': Range(int, '[1, 256]'),
  'model.width': Range(int, '[1, 2^20]'),
  'model.hidden': Range(int, '[1, 2^24]'),
  'model.heads': Range(int, '[1, 2^16]'),
  'model.kv_heads': Range(int, '[1, 2^16]'),
  'model.head_width': Range(int, '[0, 2^16]'),
  'model.norm_epsilon': Range(float, '(0, 1]'),
  'model.rope_base': Range(float, '(1, inf)'),
  'model.rope_fraction': Range(float, '(0, 1]'),
  'model.rope_factor': Range(float, '[1, inf)'),
  'model.rope_low': Range(float, '(0, inf)'),
  'model.rope_high': Range(float, '(0, inf)'),
  'model.rope_context': _COUNT,
  'model.embed_scale': Range(float, '(0, inf)'),
  'model.logit_scale': Range(float, '(0, inf)'),
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
