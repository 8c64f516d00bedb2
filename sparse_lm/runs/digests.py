"""Digests of the arrays in checkpoints, because the storage library does not detect every flipped bit."""

import json
import zlib
from collections.abc import Mapping

import jax
import numpy as np

from sparse_lm.core.records import Json

Leaf = jax.Array | np.ndarray


def of_leaf(path: str, leaf: Leaf) -> int:
  """Returns the CRC of a leaf's path and bytes."""
  flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
  return zlib.crc32(flat, zlib.crc32(path.encode()))


def of_leaves(leaves: Mapping[str, Leaf]) -> dict[str, int]:
  """Returns the CRC of every leaf by its path."""
  return {path: of_leaf(path, leaf) for path, leaf in leaves.items()}


def of_json(values: Json) -> int:
  """Returns the CRC of JSON values."""
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def check(item: str, leaves: Mapping[str, Leaf], digests: Mapping[str, int]) -> None:
  """Raises ValueError, with the names of the leaves, if leaves do not match their digests.

  Args:
    item: name of the checkpoint's item, for the message.
    leaves: some of its leaves.
    digests: digests of all of its leaves.
  """
  wrong = [path for path, leaf in leaves.items() if digests.get(path) != of_leaf(path, leaf)]
  if wrong:
    raise ValueError(
      f'the bytes of {_listed(wrong)} of item {item!r} do not match their digests in meta'
    )


def _listed(paths: list[str], shown: int = 3) -> str:
  more = f' and {len(paths) - shown} more leaves' if len(paths) > shown else ''
  return f'{", ".join(paths[:shown])}{more}'
