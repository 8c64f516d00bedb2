"""Safetensors files as memory maps, so that a large file is read array by array.

The format is a length, a JSON header with the dtype, shape and place of each array, and the arrays
(https://huggingface.co/docs/safetensors). The library `safetensors` copies each array that it reads.
"""

import dataclasses
import json
import math
import pathlib
from typing import TypedDict

import ml_dtypes
import numpy as np

from sparse_lm.core import records
from sparse_lm.core.errors import UserError, listed

# NumPy's dtypes by their names in files.
DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
_LENGTH = 8  # bytes of the length of the header


class _Place(TypedDict):
  dtype: str
  shape: list[int]
  data_offsets: list[int]


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """The arrays of a file by name, as read-only views of its memory map, and its metadata."""

  arrays: dict[str, np.ndarray]
  metadata: dict[str, str]


def open_tensors(path: pathlib.Path) -> TensorFile:
  """Maps a safetensors file into memory; the arrays are read when they are used.

  Raises UserError if the file cannot be read or is damaged, or if an array has a dtype outside `DTYPES`.
  """
  try:
    data = np.memmap(path, np.uint8, mode='r')
  except (OSError, ValueError) as error:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    raise UserError(f'{path} cannot be read ({reason}); valid: a complete folder') from None
  try:
    header, begin = _header(data)
    metadata = header.pop('__metadata__', {})
    records.check(metadata, dict[str, str], '__metadata__')
    arrays = {name: _array(name, place, data[begin:]) for name, place in header.items()}
  except ValueError as error:
    raise UserError(f'{path} is damaged ({error}); valid: an unchanged copy of it') from None
  return TensorFile(arrays, metadata)


def _header(data: np.ndarray) -> tuple[records.JsonObject, int]:
  """Returns the header and the place of the first array."""
  length = int.from_bytes(data[:_LENGTH].tobytes(), 'little')
  if not 0 < length <= min(len(data) - _LENGTH, records.LARGEST):
    raise ValueError(f'its header would have {length} bytes, and the file has {len(data)}')
  end = _LENGTH + length
  return records.parse(data[_LENGTH:end].tobytes(), records.OBJECT), end


def _array(name: str, place: records.Json, data: np.ndarray) -> np.ndarray:
  records.check(place, _Place, name)
  if place['dtype'] not in DTYPES:
    raise UserError(
      f'the tensor {name} has the dtype {place["dtype"]}, which is not supported; valid: '
      f'{listed(list(DTYPES))}'
    )
  dtype, shape = DTYPES[place['dtype']], tuple(place['shape'])
  begin, end = (place['data_offsets'] + [0, 0])[:2]
  if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
    raise ValueError(
      f'{name}, {place["dtype"]} {list(shape)}, is not at {json.dumps([begin, end])}'
    )
  return data[begin:end].view(dtype).reshape(shape)
