"""Counts the matmul FLOPs that a traced program executes, and collects the ledger from its marks.

Everything is read from the jaxpr; nothing is compiled. A scan counts once per iteration, a conditional
counts as its most expensive branch, and called functions (jit, remat, custom derivatives) are included. A
Pallas kernel counts at its own cost estimate. Only matmuls are counted: two FLOPs per multiplication and
addition.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.plan import cost, record

# Primitives that call one function once. The names differ between JAX versions.
CALLS = (
  'jit',
  'pjit',
  'closed_call',
  'core_call',
  'remat',
  'remat2',
  'checkpoint',
  'custom_jvp_call',
  'custom_vjp_call',
  'custom_vjp_call_jaxpr',
)
# Foreign calls that may contain matmuls. (Pallas kernels are not among them.)
OPAQUE = ('ffi_call', 'dot_product_attention_fwd_wrapper')
NO_REASON = 'no reason'
GATES = 'gates that are open'
PAIRS = 'keys that come after their query'
KEYS = 'keys that a cache has room for'
_NOTHING = cost.Matmul('nothing', 0.0)
Noted = TypeVar('Noted', cost.Matmul, cost.Read)


@dataclasses.dataclass(frozen=True)
class Executed:
  """Costs of a program.

  Attributes:
    flops: FLOPs of all matmuls. If `count` counts reads from caches, it is their bytes instead.
    marks: number of times that each mark of `record.MARKS` is executed.
  """

  flops: float = 0.0
  marks: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def times(self, factor: float) -> 'Executed':
    """Returns the costs of `factor` runs of the program."""
    return Executed(factor * self.flops, {mark: factor * n for mark, n in self.marks.items()})


@dataclasses.dataclass(frozen=True)
class Traced:
  """Executed and declared costs of a program.

  Attributes:
    flops: executed FLOPs, at density 1 and with all gates open.
    ledger: the charged matmuls.
    uncharged: FLOPs that modules declare as executed but not charged, by reason.
    reads: reads from caches, as the modules declare them.
  """

  flops: float
  ledger: cost.Ledger
  uncharged: dict[str, float]
  reads: cost.Reads

  def per_token(self, tokens: int) -> 'Traced':
    """Returns all FLOPs and bytes divided by a number of tokens."""
    return Traced(
      self.flops / tokens,
      {path: matmul.times(1 / tokens) for path, matmul in self.ledger.items()},
      {reason: flops / tokens for reason, flops in self.uncharged.items()},
      {path: read.times(1 / tokens) for path, read in self.reads.items()},
    )


def trace(function: Callable[..., Tree], *arguments: Tree) -> Traced:
  """Traces a function of arrays or shape structs and counts its costs. Raises what `count` raises."""
  with record.recording():
    return charged(jax.make_jaxpr(function)(*arguments))


def reads(function: Callable[..., Tree], *arguments: Tree) -> cost.Reads:
  """Returns the reads from caches, even if matmuls run an unknown number of times."""
  with record.recording():
    jaxpr = jax.make_jaxpr(function)(*arguments)
  return _noted(count(jaxpr.jaxpr, read=True)).reads


def charged(jaxpr: ClosedJaxpr) -> Traced:
  """Returns the costs of a program that was traced in a recording. Raises what `count` raises."""
  return _noted(count(jaxpr.jaxpr))


def _noted(executed: Executed) -> Traced:
  ledger: cost.Ledger = {}
  reads: cost.Reads = {}
  reasons: dict[str, float] = collections.defaultdict(float)
  for mark, times in executed.marks.items():
    noted = record.MARKS[mark]
    if isinstance(noted.noted, cost.Read):
      _add(reads, noted.name, noted.noted, times)
    elif noted.charged:
      _add(ledger, noted.name, noted.noted, times)
    else:
      reasons[noted.name] += times * noted.noted.flops
  return Traced(executed.flops, ledger, dict(reasons), reads)


def _add(entries: dict[str, Noted], name: str, own: Noted, times: float) -> None:
  """Adds a cost to the entry of its name, or to a new entry if the existing one has other gates."""
  while name in entries and entries[name].times(0) != own.times(0):
    name = f'{name} again'
  before = entries.get(name, own.times(0))
  entries[name] = before.plus(own.times(times))


def differences(claimed: cost.Ledger, traced: Traced) -> dict[str, float]:
  """Returns the executed minus the charged FLOPs, by reason.

  Attention is charged for the pairs of query and key that it reads (`cost.causal_pairs`). The charge over
  all pairs is larger by the FLOPs under `PAIRS`.

  Args:
    claimed: the ledger of the reported costs, for the same number of tokens.
    traced: the program.

  Returns:
    FLOPs by reason; reasons with zero FLOPs are omitted. The reasons are:

    - `GATES`: the computation behind gates is executed whole, but charged at its planned fraction.
    - `PAIRS`: attention computes scores of keys after their query.
    - `KEYS`: attention multiplies more keys than are charged, because the cache is larger.
    - the reasons that modules declare with `record.uncharged`.
    - `NO_REASON`: all other differences. Kernels that are multiplied more or less often than charged
      are among them.
  """
  found: dict[str, float] = collections.defaultdict(float, traced.uncharged)
  found[NO_REASON] = traced.flops - sum(traced.uncharged.values())
  for path in dict.fromkeys([*traced.ledger, *claimed]):
    own = traced.ledger.get(path, _NOTHING)
    claim = claimed.get(path, dataclasses.replace(own, flops=0.0))
    found[NO_REASON] -= own.flops
    planned = cost.forward_flops({'': claim}, {})
    found[GATES] += claim.flops - planned
    same = math.isclose(own.flops, claim.flops, rel_tol=1e-6, abs_tol=1e-6)
    found[PAIRS if same else KEYS] += planned * (1 - claim.causal)
    if not same:
      reason = KEYS if claim.kernel is None else f'{NO_REASON}: {path}'
      found[reason] += own.flops - claim.flops
  least = 1e-6 * traced.flops
  return {reason: flops for reason, flops in found.items() if abs(flops) > least}


def count(jaxpr: Jaxpr, read: bool = False) -> Executed:
  """Counts the costs of a jaxpr.

  Args:
    jaxpr: the program.
    read: whether to count bytes that are read from caches, instead of FLOPs.

  Raises:
    UserError: matmuls run an unknown number of times (for example in a while loop), or in a foreign call.
  """
  return _sum(_equation(equation, read) for equation in jaxpr.eqns)


def _sum(parts: Iterable[Executed]) -> Executed:
  flops, marks = 0.0, collections.Counter()
  for part in parts:
    flops += part.flops
    for mark, times in part.marks.items():
      marks[mark] += times
  return Executed(flops, marks)


def _equation(equation: JaxprEqn, read: bool) -> Executed:
  name, params = equation.primitive.name, equation.params
  if name in _MATMULS:
    return Executed(0.0 if read else _MATMULS[name](equation))
  if name == 'name' and params['name'] in record.MARKS:
    mark = record.MARKS[params['name']]
    grown = equation.outvars[0].aval.size / max(mark.size, 1)
    if not read:
      return Executed(marks={params['name']: grown})
    of_cache = isinstance(mark.noted, cost.Read)
    return Executed(grown * mark.noted.nbytes, {params['name']: grown}) if of_cache else Executed()
  if name == 'pallas_call' and params['cost_estimate'] is not None:
    return Executed(0.0 if read else float(params['cost_estimate'].flops))
  if name in OPAQUE and not read:
    raise UserError(f'the FLOPs of {name} cannot be counted; valid: matmuls that JAX traces')
  inside = [count(jaxpr, read) for jaxpr in _functions(params)]
  if name == 'cond':
    return max(inside, key=lambda branch: branch.flops)
  if name == 'scan':
    return _sum(inside).times(params['length'])
  if name not in CALLS and any(part.flops or part.marks for part in inside):
    raise UserError(
      f'matmuls inside {name!r} run an unknown number of times, so their FLOPs cannot be counted; valid: '
      'jax.lax.scan, or fori_loop with bounds that are Python numbers'
    )
  return _sum(inside)


def _functions(params: Mapping[str, object]) -> Iterator[Jaxpr]:
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, Jaxpr):
        yield item


def _dot(equation: JaxprEqn) -> float:
  (contract, _), (batch, _) = equation.params['dimension_numbers']
  left, right = (v.aval.shape for v in equation.invars)
  shared = math.prod(left[axis] for axis in (*contract, *batch))
  # Shared axes count only once.
  return 2.0 * math.prod(left) * math.prod(right) / shared if shared else 0.0


def _ragged_dot(equation: JaxprEqn) -> float:
  # Each row is multiplied by the matrix of its group. (XLA on a CPU multiplies it by all matrices.)
  numbers = equation.params['ragged_dot_dimension_numbers']
  (_, contract), (_, batch) = numbers.dot_dimension_numbers
  left, right = (v.aval.shape for v in equation.invars[:2])
  gone = (*contract, *batch, *numbers.rhs_group_dimensions)
  free = [size for axis, size in enumerate(right) if axis not in gone]
  return 2.0 * math.prod(left) * math.prod(free)


def _convolution(equation: JaxprEqn) -> float:
  kernel = equation.invars[1].aval
  features = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
  return 2.0 * equation.outvars[0].aval.size * kernel.size / features


_MATMULS: dict[str, Callable[[JaxprEqn], float]] = {
  'dot_general': _dot,
  'ragged_dot': _ragged_dot,
  'ragged_dot_general': _ragged_dot,
  'conv_general_dilated': _convolution,
}
