"""Packed runs: several runs as one program, the steps of `train/step.py` vmapped over runs.

Shapes: N runs, B batch, L context, K steps whose windows a feed holds. N is the leading axis of states.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.stages import Wrapped

from sparse_lm.core.aot import AotFunction
from sparse_lm.core.tree import Tree
from sparse_lm.data import windows
from sparse_lm.kernels import device
from sparse_lm.train.numbers import with_numbers
from sparse_lm.train.on_host import host_device
from sparse_lm.train.states import TrainState
from sparse_lm.train.step import Program, Updates

Array = jax.Array


class Feed(struct.PyTreeNode):
  """The inputs of packed steps besides the states, on the device.

  Attributes:
    tokens: `[T]`, the training split, which all runs share.
    numbers: float32 `[N]` by name (`train/numbers.py`).
    first: int32, the step of the first entry of `starts_KxNxB`.
    starts_KxNxB: int32, start in `tokens` of each window, for each step and run.
  """

  tokens: Array
  numbers: dict[str, Array]
  first: Array
  starts_KxNxB: Array


class PackedMetrics(struct.PyTreeNode):
  """The metrics of one step of all runs, in one array so that the host needs a single copy.

  Attributes:
    values_NxM: float32 values of the M metrics.
    names: their names.
  """

  values_NxM: Array
  names: tuple[str, ...] = struct.field(pytree_node=False)

  @classmethod
  def of(cls, metrics: dict[str, Array]) -> 'PackedMetrics':
    """Packs metrics of shape `[N]` or `[N, C]`; C columns become `name/0`, `name/1`, ..."""
    columns: dict[str, Array] = {}
    for name, value in metrics.items():
      if value.ndim == 1:
        columns[name] = value
      else:
        columns |= {f'{name}/{i}': value[:, i] for i in range(value.shape[1])}
    values = [value.astype(jnp.float32) for value in columns.values()]
    return cls(jnp.stack(values, axis=1), tuple(columns))


@dataclasses.dataclass(frozen=True)
class PackedProgram:
  """The compiled functions of a pack of N runs.

  Attributes:
    program: the program that the runs share (`numbers.common`).
  """

  program: Program

  def step(self, runs: TrainState, feed: Feed, updates: Updates) -> tuple[TrainState, Tree]:
    """Runs one optimizer step of all runs, uncompiled; returns the states and a `PackedMetrics`.

    Args:
      runs: the states.
      feed: the other inputs.
      updates: the parts of the weight method that update their masks in this step, and the parts that
        collect signals; the same for all runs.
    """
    length = self.program.model.spec.context + 1
    starts_NxB = feed.starts_KxNxB[runs.step[0] - feed.first]

    def one(
      numbers: dict[str, Array], state: TrainState, starts_B: Array
    ) -> tuple[TrainState, dict[str, Array]]:
      tokens_BxL1 = windows.gather(feed.tokens, starts_B, length)
      program = with_numbers(self.program, numbers)
      return program.transition(state, tokens_BxL1, updates=updates[0], collects=updates[1])

    runs, metrics = jax.vmap(one)(feed.numbers, runs, starts_NxB)
    return runs, PackedMetrics.of(metrics)

  @functools.cached_property
  def init(self) -> AotFunction:
    """`(seed, target) -> TrainState` of one run, computed on the host as by `OnHost`."""
    return AotFunction(self.program.create, device=host_device())

  @functools.cached_property
  def _steps(self) -> dict[Updates, AotFunction]:
    return {}

  def steps(self, updates: Updates) -> AotFunction:
    """Returns the compiled `step`: `(states, feed) -> (states, PackedMetrics)`; donates the states."""
    if updates not in self._steps:
      step = functools.partial(self.step, updates=updates)
      self._steps[updates] = AotFunction(step, donate=(0,), options=device.compiler_options())
    return self._steps[updates]

  @functools.cached_property
  def finalize(self) -> AotFunction:
    """`(states, numbers) -> (params, masks)` as they are evaluated, reported and exported."""

    def one(state: TrainState, numbers: dict[str, Array]) -> tuple[Tree, Tree]:
      method = with_numbers(self.program, numbers).method
      return method.finalize(state.evaluated, state.sparse, state.step)

    return AotFunction(jax.vmap(one))

  @functools.cached_property
  def non_finite(self) -> Wrapped:
    """`states -> flags by path`, bool `[N]`; see `Program.non_finite`."""
    return jax.jit(jax.vmap(self.program.non_finite))


@functools.cache
def packed(program: Program) -> PackedProgram:
  """Returns the `PackedProgram` of a common program; packs with the same program share its executables.

  The cache is unlimited, because a study compiles all of its packs before it trains the first one.
  """
  return PackedProgram(program)


def stack(runs: Sequence[TrainState]) -> TrainState:
  """Stacks states on the host, which needs no compilation, and copies them to the device."""
  hosts = [jax.device_get(state.replace(key=jax.random.key_data(state.key))) for state in runs]
  stacked = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *hosts))
  keys = jax.random.wrap_key_data(stacked.key, impl=jax.random.key_impl(runs[0].key))
  return stacked.replace(key=keys)
