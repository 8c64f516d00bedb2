"""A function whose outputs have little to do with each other, compiled output by output.

The initial state of a model has random numbers, masks and zeros for each of its leaves. As one program it
takes the compiler of an accelerator 45 s. Yet most leaves have the shape of others, and their random
numbers differ in a constant alone, with which their keys are folded.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.interpreters import partial_eval
from jax.stages import Wrapped

from sparse_lm.core.tree import Tree

THREADS = min(16, os.cpu_count() or 1)  # that compile at the same time
ALIKE = 6  # times as many parts as programs, below which the whole is one program


class ByOutput:
  """`function`, with one program for all outputs that are computed alike.

  Outputs that share more than scalars (a mask and the weights that it zeroes) are computed together.
  Each program rounds as the whole would, since it computes with the same constants. A function of few
  outputs that are alike is one program, and where an argument is traced it is traced as a whole.
  """

  def __init__(self, function: Callable[..., Tree]) -> None:
    self._jitted = jax.jit(function)
    self._parts: dict[Hashable, list[_Part]] = {}

  @property
  def traces(self) -> int:
    """How many shapes and dtypes of arguments it was called with."""
    return len(self._parts)

  def __call__(self, *arguments: Tree) -> Tree:
    """The function's outputs."""
    leaves, structure = jax.tree.flatten(arguments)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
      return self._jitted(*arguments)
    traced = self._jitted.trace(*arguments)
    values = [*leaves, *traced.jaxpr.consts]
    key = structure, tuple(map(jax.typeof, leaves))
    if key not in self._parts:
      self._parts[key] = _split(traced.jaxpr)
      _compile(self._parts[key], values)
    if not self._parts[key]:
      return self._jitted(*arguments)
    outputs: dict[int, jax.Array] = {}
    for part in self._parts[key]:
      outputs |= zip(part.outputs, part.run(values))
    found = [outputs[number] for number in range(len(outputs))]
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), found)


@dataclasses.dataclass(frozen=True)
class _Part:
  """What computes some of the outputs.

  Attributes:
    outputs: which of the function's they are.
    inputs: which of its arguments are read.
    numbers: uint32 scalars in which this part differs from others with the same program.
    program: `(*numbers, *inputs) -> outputs`.
  """

  outputs: tuple[int, ...]
  inputs: tuple[int, ...]
  numbers: tuple[np.ndarray, ...]
  program: Wrapped

  def arguments(self, values: Sequence[jax.Array]) -> list[jax.Array | np.ndarray]:
    """The program's arguments, out of all values of the function's arguments."""
    return [*self.numbers, *(values[number] for number in self.inputs)]

  def run(self, values: Sequence[jax.Array]) -> list[jax.Array]:
    """The outputs, see `arguments`."""
    return self.program(*self.arguments(values))


def _compile(parts: list[_Part], values: Sequence[jax.Array]) -> None:
  """Compiles each program once, several at the same time."""
  lowered = {part.program: part for part in parts}
  lowered = [part.program.lower(*part.arguments(values)) for part in lowered.values()]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for compiled in [pool.submit(one.compile) for one in lowered]:
      compiled.result()


def _split(closed: ClosedJaxpr) -> list[_Part]:
  """The parts of a function, of which those that compute alike share a program; none where few do."""
  jaxpr, _ = partial_eval.dce_jaxpr(
    closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True
  )
  producers = {var: number for number, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
  owners = _owners(jaxpr.eqns, producers)
  groups: dict[int | None, list[int]] = {}
  for number, atom in enumerate(jaxpr.outvars):
    made = None if isinstance(atom, Literal) else producers.get(atom)
    groups.setdefault(None if made is None else owners[made], []).append(number)
  places = {var: number for number, var in enumerate([*jaxpr.invars, *jaxpr.constvars])}
  programs: dict[Hashable, Wrapped] = {}
  parts, keys = [], _Keys()
  for outputs in groups.values():
    wanted = [jaxpr.outvars[number] for number in outputs]
    part, numbers = _freed(jaxpr, _needed(jaxpr.eqns, producers, wanted), wanted)
    read = part.invars[len(numbers) :]
    key = keys.of(part)
    if key not in programs:
      programs[key] = jax.jit(jaxpr_as_fun(ClosedJaxpr(part, ())))
    inputs = tuple(places[var] for var in read)
    parts.append(_Part(tuple(outputs), inputs, numbers, programs[key]))
  return parts if len(parts) >= ALIKE * len(programs) else []


def _owners(eqns: Sequence[JaxprEqn], producers: dict[Var, int]) -> list[int | None]:
  """By equation, the first of those that it shares more than scalars with; `None` for a scalar one.

  Scalars that follow from arguments and scalars alone, such as keys, are computed anew in each part.
  """
  owners: list[int | None] = []

  def owner(number: int) -> int:
    while owners[number] != number:
      number = owners[number]
    return number

  for number, eqn in enumerate(eqns):
    made = [producers[atom] for atom in _read_by(eqn) if atom in producers]
    large = {owner(other) for other in made if owners[other] is not None}
    if not large and all(var.aval.size == 1 for var in eqn.outvars):
      owners.append(None)
      continue
    owners.append(min(large, default=number))
    for other in large:
      owners[other] = owners[number]
  return [None if one is None else owner(one) for one in owners]


def _needed(
  eqns: Sequence[JaxprEqn], producers: dict[Var, int], wanted: Sequence[Var | Literal]
) -> list[JaxprEqn]:
  """The equations that lead to `wanted`, in their order."""
  found: set[int] = set()
  pending = [
    producers[atom] for atom in wanted if not isinstance(atom, Literal) and atom in producers
  ]
  while pending:
    number = pending.pop()
    if number not in found:
      found.add(number)
      pending += [producers[atom] for atom in _read_by(eqns[number]) if atom in producers]
  return [eqns[number] for number in sorted(found)]


def _read_by(eqn: JaxprEqn) -> Iterator[Var]:
  return (atom for atom in eqn.invars if not isinstance(atom, Literal))


def _freed(
  whole: Jaxpr, eqns: Sequence[JaxprEqn], wanted: Sequence[Var | Literal]
) -> tuple[Jaxpr, tuple[np.ndarray, ...]]:
  """The equations as a jaxpr of their own, and the numbers, its first arguments, that make its keys.

  What a key is folded with is all by which the random numbers of two leaves of one shape differ.
  """

  def free(eqn: JaxprEqn, atom: Var | Literal) -> bool:
    return isinstance(atom, Literal) and eqn.primitive.name == 'random_fold_in'

  read = dict.fromkeys(var for eqn in eqns for var in _read_by(eqn))
  read |= dict.fromkeys(atom for atom in wanted if not isinstance(atom, Literal))
  made = {var for eqn in eqns for var in eqn.outvars}
  numbers = tuple(np.uint32(atom.val) for eqn in eqns for atom in eqn.invars if free(eqn, atom))
  names = jax.make_jaxpr(lambda *values: values)(*numbers).jaxpr.invars
  rest = iter(names)
  eqns = [
    eqn.replace(invars=[next(rest) if free(eqn, atom) else atom for atom in eqn.invars])
    for eqn in eqns
  ]
  invars = [*names, *(var for var in read if var not in made)]
  part = whole.replace(invars=invars, constvars=[], outvars=list(wanted), eqns=eqns)
  return part, numbers


class _Keys:
  """What is equal for jaxprs that compute alike: all but the names of their variables."""

  def __init__(self) -> None:
    self._known: dict[int, Hashable] = {}  # by the id of a jaxpr

  def of(self, jaxpr: Jaxpr) -> Hashable:
    """The key of a jaxpr, which must outlive this object."""
    names: dict[Var, int] = {}

    def name(atom: Var | Literal) -> Hashable:
      if isinstance(atom, Literal):
        return str(atom.aval), np.asarray(atom.val).tobytes()
      return names.setdefault(atom, len(names)), str(atom.aval)

    return (
      tuple(map(name, [*jaxpr.invars, *jaxpr.constvars])),
      tuple(
        (
          eqn.primitive.name,
          tuple(map(name, [*eqn.invars, *eqn.outvars])),
          tuple((field, self._param(value)) for field, value in sorted(eqn.params.items())),
        )
        for eqn in jaxpr.eqns
      ),
      tuple(map(name, jaxpr.outvars)),
    )

  def _param(self, value: object) -> Hashable:
    if isinstance(value, ClosedJaxpr):
      return self._param(value.jaxpr), tuple(map(id, value.consts))
    if isinstance(value, Jaxpr):
      if id(value) not in self._known:
        self._known[id(value)] = self.of(value)
      return self._known[id(value)]
    if isinstance(value, tuple | list):
      return tuple(map(self._param, value))
    try:
      hash(value)
    except TypeError:
      return id(value)
    return type(value), repr(value) if isinstance(value, float) else value
