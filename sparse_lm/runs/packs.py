"""Choosing the runs that train as one program (see `train/packed.py`) and fit in memory together."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from sparse_lm.core import tree
from sparse_lm.core.aot import Call, compile_together
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.measure import machine
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.evaluate import evaluation_of_packed
from sparse_lm.runs.setup import Setup
from sparse_lm.train import numbers
from sparse_lm.train.packed import Feed, PackedProgram, packed
from sparse_lm.train.states import TrainState
from sparse_lm.train.step import Program, Updates, shared
from sparse_lm.weights import parts

T = TypeVar('T')
CHUNK = 10  # steps whose windows' starts are sent to the device at once
INTERVALS = ('train.steps', 'train.log_every', 'train.eval_every')


def alone_because(run: Setup) -> str | None:
  """Returns the reason why a run cannot be packed, or `None` if it can."""
  if run.parent is not None:
    return 'it starts from another run (config.init_from)'
  if run.teacher is not None:
    return 'it learns from a teacher (config.distill.teacher)'
  if parts.at_start(run.program.method):
    return 'its masks are chosen before the first step'
  return None


def key(run: Setup) -> Hashable:
  """Returns a key that is equal for runs that can be packed.

  Such runs have equal programs except for `numbers.numbers`. They prune the same parameters, read the
  same data, and update masks, log and evaluate at the same steps. They may differ in the values that
  are traced: the seed (and so the order of the data), the final densities, and `numbers.numbers`.
  """
  fields = configs.flat(run.config)
  return (
    common(run),
    tuple(tree.named(run.target)),
    json.dumps(configs.to_json(run.config.data)),
    run.data.tokenizer.digest,
    *(fields[name] for name in INTERVALS),
  )


def difference(one: Setup, other: Setup) -> str | None:
  """Returns the reason why two runs cannot be packed, or `None` if they can."""
  for run in (one, other):
    if reason := alone_because(run):
      return reason
  if key(one) == key(other):
    return None
  ours, theirs = configs.flat(one.config), configs.flat(other.config)
  in_both = numbers.numbers(one.program).keys() & numbers.numbers(other.program).keys()
  traced = {name.removeprefix('config.') for name in in_both}
  differ = [
    f'config.{name} ({ours.get(name)!r} and {theirs.get(name)!r})'
    for name in {**ours, **theirs}
    if ours.get(name) != theirs.get(name) and not _may_differ(name, traced)
  ]
  return f'they differ in {", ".join(differ) or "what they prune"}'


def _may_differ(name: str, traced: set[str]) -> bool:
  sparsity = name.startswith('weight.') and name.endswith('.sparsity')
  return sparsity or name in {'seed', 'train.checkpoint_every', *traced}


def common(run: Setup) -> Program:
  """Returns the program that all runs of a pack share."""
  return shared(numbers.common(run.program))


@dataclasses.dataclass(frozen=True)
class Pack:
  """Runs that are trained as one program.

  Attributes:
    runs: each with the program that is common to all.
    numbers: by name, float32 `[N]`, the numbers in which runs may differ, see `train/numbers.py`.
  """

  runs: tuple[Setup, ...]
  numbers: dict[str, jax.Array]

  @classmethod
  def of(cls, runs: Sequence[Setup]) -> 'Pack':
    """Makes a pack of runs. Raises UserError with the difference if they cannot be packed."""
    for run in runs:
      if reason := difference(runs[0], run):
        raise UserError(
          f'runs of config.seed={runs[0].config.seed} and {run.config.seed} cannot be packed: {reason}; '
          'valid: runs that differ in seed, sparsity, learning rate, weight decay or penalty'
        )
    own = [numbers.numbers(run.program) for run in runs]
    program = common(runs[0])
    return cls(
      tuple(dataclasses.replace(run, program=program) for run in runs),
      {name: jnp.array([each[name] for each in own], jnp.float32) for name in own[0]},
    )

  def only(self, indices: Sequence[int]) -> 'Pack':
    """The pack of some of the runs."""
    chosen = jnp.array(indices)
    return Pack(
      tuple(self.runs[index] for index in indices),
      {name: values[chosen] for name, values in self.numbers.items()},
    )

  @property
  def program(self) -> PackedProgram:
    """The program of the pack."""
    return packed(self.runs[0].program)

  def compiled(self, first: int = 0) -> dict[Updates, Compiled]:
    """Returns the compiled steps that remain after `first` steps, by the mask updates that they do."""
    compile_together(self.calls(first))
    return {
      updates: self.program.steps(updates).compiled(self._states, self._feed)
      for updates in self._all_updates(first)
    }

  def calls(self, first: int = 0) -> list[Call]:
    """Returns the functions that a pack needs after `first` steps, with their arguments, to compile."""
    finalize = Call(self.program.finalize, (self._states, self._feed.numbers))
    params, _ = finalize.function.outputs(*finalize.arguments)
    evaluation = evaluation_of_packed(self.runs[0], params, self._states.model_state)
    steps = [
      Call(self.program.steps(updates), (self._states, self._feed))
      for updates in self._all_updates(first)
    ]
    return [Call(self.program.init, self._beginning(0)), *steps, finalize, evaluation]

  def start(self) -> list[TrainState]:
    """Each run's state at step 0, on the host."""
    return [self.program.init(*self._beginning(number)) for number in range(len(self.runs))]

  def _beginning(self, number: int) -> tuple[np.int32, Tree]:
    """A run's seed and target."""
    run = self.runs[number]
    return np.int32(run.config.seed), jax.device_get(run.target)

  def _all_updates(self, first: int) -> list[Updates]:
    steps = range(first, self.runs[0].config.train.steps)
    return list(dict.fromkeys(map(self.runs[0].program.updates, steps)))

  def bytes_at_least(self) -> int:
    """Bytes of the states and the training text, a lower bound that needs no compilation."""
    return tree.nbytes((self._states.replace(key=None), self._feed))

  def bytes_shared(self) -> int:
    """Bytes of what the runs share: the training text, and the number of a step."""
    return tree.nbytes((self._feed.tokens, self._feed.first))

  def bytes(self) -> int:
    """Bytes that the largest compiled step takes, all buffers included."""
    return max(machine.peak_memory(compiled) for compiled in self.compiled().values())

  @functools.cached_property
  def _states(self) -> TrainState:
    """Shape structs of the states."""
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((len(self.runs), *leaf.shape), leaf.dtype),
      self.program.init.outputs(*self._beginning(0)),
    )

  @functools.cached_property
  def _feed(self) -> Feed:
    """Shape structs of the feed."""
    data = self.runs[0].data
    tokens = data.tokens['train']
    return Feed(
      tokens=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype),
      numbers={name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self.numbers.items()},
      first=jax.ShapeDtypeStruct((), jnp.int32),
      starts_KxNxB=jax.ShapeDtypeStruct((CHUNK, len(self.runs), data.batch), jnp.int32),
    )


def fitting(pack: Pack) -> int:
  """Returns how many runs of the pack fit in the device's memory together."""
  room, count, fixed = runtime.memory(), len(pack.runs), pack.bytes_shared()
  for measure in (pack.bytes_at_least, pack.bytes):
    if (need := measure()) > room:
      fits = math.floor(count * (room - fixed) / (need - fixed))
      return max(0, min(count - 1, fits))
  return count


def compile_packs(packs: Sequence[Pack]) -> None:
  """Compiles the functions of all packs that may fit in memory, in parallel and in advance."""
  room = runtime.memory()
  compile_together(call for pack in packs if pack.bytes_at_least() <= room for call in pack.calls())


def split(runs: Sequence[Setup], most: int) -> list[Sequence[int]]:
  """Returns the indices of the runs of each pack. Packs have at most `most` runs and similar sizes.

  Runs that cannot be packed are packs of one.
  """
  groups: dict[Hashable, list[int]] = {}
  for number, run in enumerate(runs):
    own = ('alone', number) if alone_because(run) else key(run)
    groups.setdefault(own, []).append(number)
  return [part for group in groups.values() for part in parts_of(group, most)]


def parts_of(group: Sequence[T], most: int) -> list[Sequence[T]]:
  """Splits a group into parts of at most `most` elements and similar sizes."""
  count = math.ceil(len(group) / most)
  bounds = [len(group) * number // count for number in range(count + 1)]
  return [group[begin:end] for begin, end in itertools.pairwise(bounds)]
