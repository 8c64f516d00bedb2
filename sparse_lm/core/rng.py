"""Independent random streams, all derived from `config.seed`.

Runs with the same seed get the same data and the same initial weights, whatever random numbers their
methods draw. So runs can be compared seed by seed.
"""

import zlib

import jax


def stream(seed: int, name: str) -> jax.Array:
  """Returns the key of a named stream, such as 'init', 'masks' or 'model'."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def data_seed(seed: int) -> int:
  """Returns the data pipeline's seed, which is an integer and not a JAX key."""
  return zlib.crc32(f'data {seed}'.encode()) & 0x7FFFFFFF
