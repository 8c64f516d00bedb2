"""Peak performance of this machine, and peak memory of compiled programs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def matmul(size: int = 2048, dtype: str = 'float32') -> tuple[Callable[[], jax.Array], float]:
  """Returns a function that multiplies square matrices, and its FLOPs, to measure peak FLOP/s."""
  # Drawn on the host, which needs no compilation.
  a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), 'f'), dtype)
  multiply = jax.jit(jnp.matmul)
  return (lambda: multiply(a, a)), 2.0 * size**3


def read(bytes_: int = 400_000_000) -> tuple[Callable[[], jax.Array], float]:
  """Returns a function that sums a large array, and the bytes that it reads, to measure bandwidth."""
  a = jnp.ones(bytes_ // 4, jnp.float32)
  total = jax.jit(jnp.sum)
  return (lambda: total(a)), float(a.nbytes)


def copy(bytes_: int = 2_000_000_000) -> tuple[Callable[[], jax.Array], float]:
  """Returns a function that negates a large array, and the bytes that it reads and writes."""
  a = jnp.ones(bytes_ // 4, jnp.float32)
  negate = jax.jit(jnp.negative)
  return (lambda: negate(a)), 2.0 * a.nbytes


def peak_memory(compiled: jax.stages.Compiled) -> int | None:
  """Returns the peak bytes of a compiled step according to XLA: arguments, results and temporaries."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
  return int(sum(sizes) - memory.alias_size_in_bytes)
