"""Separate random streams, all derived from one `config.seed`.

The data and the initialisation of two runs with one seed are equal whatever their methods draw, so
that differences can be taken seed by seed.
"""

import zlib

import jax


def stream(seed: int, name: str) -> jax.Array:
  """The key of the stream of that name: 'init', 'masks', 'model', ..."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def data_seed(seed: int) -> int:
  """The data pipeline's seed (it is not a JAX key)."""
  return zlib.crc32(f'data {seed}'.encode()) & 0x7FFFFFFF
