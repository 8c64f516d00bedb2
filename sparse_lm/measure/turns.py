"""Timing that survives a noisy machine: candidates take turns in one process, ratios turn by turn."""

import abc
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
import numpy as np
from tqdm import tqdm

from sparse_lm.core.tree import Tree

Label = TypeVar('Label', bound=Hashable)


class Prepared(abc.ABC):
  """A call that needs something made anew before each turn, outside the time that is measured."""

  @abc.abstractmethod
  def prepare(self) -> Tree:
    """Makes it, and returns the arrays to wait for before the clock starts."""

  @abc.abstractmethod
  def __call__(self) -> Tree:
    """What is timed; returns the arrays to wait for."""


def interleaved(
  calls: Mapping[Label, Callable[[], Tree]], repeats: int, name: str = '', warmup: int = 2
) -> dict[Label, np.ndarray]:
  """Seconds of each call, `[repeats]`, in turns; each waits for its arrays.

  The order is drawn anew for each turn: what follows a large call finds the caches cold.

  Args:
    calls: by label; one that is `Prepared` is prepared before each of its turns.
    repeats: turns that are measured.
    name: beside the progress bar.
    warmup: turns before them that are not measured.
  """
  draw, pairs = np.random.default_rng(0), list(calls.items())
  seconds: dict[Label, list[float]] = {label: [] for label in calls}
  for turn in tqdm(range(warmup + repeats), desc=name, unit='turn', leave=False, disable=None):
    for place in draw.permutation(len(pairs)):
      label, call = pairs[place]
      if isinstance(call, Prepared):
        jax.block_until_ready(call.prepare())
      start = time.perf_counter()
      jax.block_until_ready(call())
      if turn >= warmup:
        seconds[label].append(time.perf_counter() - start)
  return {label: np.array(values) for label, values in seconds.items()}


def ratio(seconds: np.ndarray, reference: np.ndarray) -> dict[str, float]:
  """Median and quartiles of `seconds / reference`, turn by turn."""
  low, median, high = np.percentile(seconds / reference, (25, 50, 75))
  return {'ratio': float(median), 'ratio_low': float(low), 'ratio_high': float(high)}
