"""Timing that survives a noisy machine: candidates take turns in one process, ratios turn by turn."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


def interleaved(
  calls: dict[str, Callable[[], Any]], repeats: int, name: str = '', warmup: int = 2
) -> dict[str, np.ndarray]:
  """Seconds of each call, `[repeats]`, in turns; each waits for its arrays.

  What a call has as `prepare` runs before it and is not timed; the arrays that it returns are awaited
  before the clock starts. The order is drawn anew for each turn:
  what follows a large call finds the caches cold.
  """
  draw, pairs = np.random.default_rng(0), list(calls.items())
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for turn in tqdm(range(warmup + repeats), desc=name, unit='turn', leave=False, disable=None):
    for place in draw.permutation(len(pairs)):
      label, call = pairs[place]
      jax.block_until_ready(getattr(call, 'prepare', lambda: None)())
      start = time.perf_counter()
      jax.block_until_ready(call())
      if turn >= warmup:
        seconds[label].append(time.perf_counter() - start)
  return {label: np.array(values) for label, values in seconds.items()}


def ratio(seconds: np.ndarray, reference: np.ndarray) -> dict[str, float]:
  """Median and quartiles of `seconds / reference`, turn by turn."""
  low, median, high = np.percentile(seconds / reference, (25, 50, 75))
  return {'ratio': float(median), 'ratio_low': float(low), 'ratio_high': float(high)}


def matmul(size: int = 2048) -> tuple[Callable[[], jax.Array], float]:
  """A float32 square matmul and its FLOPs: what this machine's library reaches at best."""
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
  multiply = jax.jit(jnp.matmul)
  return (lambda: multiply(a, a)), 2.0 * size**3


def read(bytes_: int = 400_000_000) -> tuple[Callable[[], jax.Array], float]:
  """A sum over a large float32 array and its bytes: what this machine's memory reaches at best."""
  a = jnp.ones(bytes_ // 4, jnp.float32)
  total = jax.jit(jnp.sum)
  return (lambda: total(a)), float(a.nbytes)


def peak_memory(compiled: Any) -> int | None:
  """Bytes that a compiled step holds at once, by XLA's own account: arguments, results and scratch."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
  return int(sum(sizes) - memory.alias_size_in_bytes)
