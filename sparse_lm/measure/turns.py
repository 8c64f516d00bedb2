"""Timing for noisy machines: candidates take turns in one process, and ratios are taken per turn."""

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
  """A call that needs a preparation before each turn, which is not timed."""

  @abc.abstractmethod
  def prepare(self) -> Tree:
    """Prepares the call; returns the arrays to wait for before the clock starts."""

  @abc.abstractmethod
  def __call__(self) -> Tree:
    """Runs the timed call; returns the arrays to wait for."""


def interleaved(
  calls: Mapping[Label, Callable[[], Tree]], repeats: int, name: str = '', warmup: int = 2
) -> dict[Label, np.ndarray]:
  """Times several calls in turns; returns the seconds of each call by label, `[repeats]`.

  Each turn runs the calls in a new random order, because a call after a large one finds the caches cold.

  Args:
    calls: the calls by label; each returns the arrays to wait for. A `Prepared` call is prepared before
      each turn.
    repeats: number of measured turns.
    name: label of the progress bar.
    warmup: number of turns before them that are not measured.
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
  """Returns the median and the quartiles of `seconds / reference` over turns."""
  low, median, high = np.percentile(seconds / reference, (25, 50, 75))
  return {'ratio': float(median), 'ratio_low': float(low), 'ratio_high': float(high)}
