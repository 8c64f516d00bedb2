"""The cost ledger: the matmuls of a forward pass, what may skip them, and sums over them.

Matmuls are noted with `record.matmul`, and `plan/executed.py` collects the notes from the traced program,
so a matmul in a loop is charged as often as the loop runs. `flops` are counted over the whole traced call
and divided by its tokens, so a layer that sees fewer tokens notes less. What a gate can skip is noted
inside `record.gated`, and costs as much as the gate is active.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree

Array = jax.Array
Fraction = float | Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gating:
  """How a method that leaves out work declares it.

  Attributes:
    planned: the fraction that runs as far as the config fixes it, before anything is measured.
    controlled: whether the budget controller can move it.
    skips: whether decoding leaves out what it closes, where a head's gate, say, only zeroes it.
  """

  planned: float = 1.0
  controlled: bool = False
  skips: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(Gating):
  """What may skip a matmul.

  Attributes:
    path: of the module that decides; it sows `active` into `gates`, the fraction of its units that run
      for each token, float32 `[B, L]`.
  """

  path: str


@dataclasses.dataclass(frozen=True)
class Matmul:
  """One matmul of the forward pass.

  Attributes:
    kind: 'linear', or what else ran ('attention').
    flops: multiplications and additions, over the traced call, every gate open.
    kernel: path of the parameter that it multiplies with, `None` for activations with activations.
    gates: what may skip it, from the outermost in.
    causal: share of the FLOPs of attention that falls to pairs whose key is not behind the query.
  """

  kind: str
  flops: float
  kernel: str | None = None
  gates: tuple[Gate, ...] = ()
  causal: float = 1.0

  def times(self, factor: float) -> 'Matmul':
    """The entry with its FLOPs multiplied by `factor`."""
    return dataclasses.replace(self, flops=factor * self.flops)

  def plus(self, other: 'Matmul') -> 'Matmul':
    """The entry with the FLOPs of another one added."""
    return dataclasses.replace(self, flops=self.flops + other.flops)


@dataclasses.dataclass(frozen=True)
class Read:
  """What decoding reads of what a layer keeps of earlier tokens.

  Attributes:
    nbytes: over the traced call, every gate open.
    gates: what may skip it, from the outermost in.
  """

  nbytes: float
  gates: tuple[Gate, ...] = ()

  def times(self, factor: float) -> 'Read':
    """The entry with its bytes multiplied by `factor`."""
    return dataclasses.replace(self, nbytes=factor * self.nbytes)

  def plus(self, other: 'Read') -> 'Read':
    """The entry with the bytes of another one added."""
    return dataclasses.replace(self, nbytes=self.nbytes + other.nbytes)


Ledger = dict[str, Matmul]
Reads = dict[str, Read]


def forward_flops(
  ledger: Ledger,
  density: Mapping[str, Fraction],
  activity: Mapping[str, Fraction] | None = None,
) -> Fraction:
  """FLOPs of the ledger, each kernel at its density (1 where not named), each gate at its activity.

  Densities and activities may be traced. Nested gates count at the joint fraction where `activity` has
  it (see `fractions`), else at the product of theirs; a gate that was not measured counts as planned.
  """
  return sum(
    m.flops * density.get(m.kernel, 1.0) * _active(m, activity or {}) for m in ledger.values()
  )


def read_bytes(reads: Reads, activity: Mapping[str, Fraction] | None = None) -> Fraction:
  """Bytes that are read of what layers keep, each gate at its activity; see `forward_flops`."""
  return sum(read.nbytes * _active(read, activity or {}) for read in reads.values())


def _active(own: Matmul | Read, activity: Mapping[str, Fraction]) -> Fraction:
  separate = math.prod(activity.get(gate.path, gate.planned) for gate in own.gates)
  return activity.get(_joint(own.gates), separate)


def fractions(ledger: Ledger | Reads, active: Mapping[str, Array]) -> dict[str, Array]:
  """The fraction of the work behind each gate that runs, and of the work behind nested gates.

  Gates that open for the same tokens leave more than the product of their means, so nested gates are
  multiplied token by token before the mean is taken.

  Args:
    active: what the gates sowed, by their paths: `[B, L]`, or what broadcasts to it.

  Returns:
    Scalars by the path of a gate, or by the paths of nested gates, outermost first, with `&` between
    them. Gates of which none was measured are left out.
  """
  nested = dict.fromkeys(m.gates for m in ledger.values())
  single = dict.fromkeys((gate,) for gates in nested for gate in gates)
  return {
    _joint(gates): jnp.mean(math.prod(active.get(gate.path, gate.planned) for gate in gates))
    for gates in single | nested
    if any(gate.path in active for gate in gates)
  }


def _joint(gates: tuple[Gate, ...]) -> str:
  return '&'.join(gate.path for gate in gates)


def read_shares(
  ledger: Ledger,
  sizes: Mapping[str, int],
  active: Mapping[str, Array] | None = None,
  skips: Callable[[Gate], bool] = lambda gate: True,
) -> dict[str, float]:
  """By the path of a kernel, the share of its weights that a token is multiplied with.

  A stack of experts is read as far as tokens visit it, and never more than once.

  Args:
    ledger: FLOPs per token.
    sizes: weights of each kernel.
    active: what gates sowed, by their paths, see `fractions`; the other gates count as planned.
    skips: which gates leave out what they close.
  """
  kept = {
    path: dataclasses.replace(m, gates=tuple(filter(skips, m.gates))) for path, m in ledger.items()
  }
  measured = fractions(kept, active or {})
  multiplied = {m.kernel: m for m in kept.values() if m.kernel is not None}
  flops = {path: float(forward_flops({'': m}, {}, measured)) for path, m in multiplied.items()}
  return {path: min(1.0, flops[path] / (2 * sizes[path])) for path in flops}


def active_params(ledger: Ledger, density: dict[str, float], activity: dict[str, float]) -> float:
  """Weights that a token is multiplied with: half the FLOPs of the matmuls with parameters."""
  linear = {path: m for path, m in ledger.items() if m.kernel is not None}
  return forward_flops(linear, density, activity) / 2


def extremes(ledger: Ledger, density: dict[str, float]) -> tuple[float, float]:
  """FLOPs with every gate that the controller can move closed, and with all of them open."""
  moved = {gate.path for m in ledger.values() for gate in m.gates if gate.controlled}
  closed, opened = (
    forward_flops(ledger, density, dict.fromkeys(moved, fraction)) for fraction in (0.0, 1.0)
  )
  return closed, opened


def causal_pairs(ledger: Ledger) -> Ledger:
  """The ledger in which attention is charged for the pairs of query and key that it reads alone."""
  return {path: dataclasses.replace(m, flops=m.flops * m.causal) for path, m in ledger.items()}


def ungated(ledger: Ledger) -> Ledger:
  """The ledger of a pass that computes what gates close and multiplies it by zero."""
  return {path: dataclasses.replace(m, gates=()) for path, m in ledger.items()}


def training_flops(
  forward: float, weight_gradient: float | None = None, passes: float = 1
) -> float:
  """FLOPs of a training step: its forward passes, gradient of the inputs, gradient of the weights.

  Each costs as much as a forward pass at the densities of that step, but where a step needs the
  gradient of dropped weights the last one is dense (RigL 2020, appendix H: on average
  `(3 f_S (T - 1) + 2 f_S + f_D) / T` with an update every T steps).

  Args:
    forward: FLOPs of one forward pass.
    weight_gradient: FLOPs of the gradient of the weights, by default as many.
    passes: forward passes, of which one is differentiated; a part of one where a part is recomputed.
  """
  return (passes + 1) * forward + (forward if weight_gradient is None else weight_gradient)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Counts of parameters and bytes.

  Attributes:
    params: all parameters.
    prunable: those in leaves with a mask or a target.
    nonzero: parameters left.
    stored_bytes: the kept weights and, for masked leaves, a bit for every weight.
  """

  params: int
  prunable: int
  nonzero: int
  stored_bytes: int

  @property
  def sparsity_prunable(self) -> float:
    """Dropped over prunable parameters."""
    return (self.params - self.nonzero) / max(self.prunable, 1)

  @property
  def sparsity_total(self) -> float:
    """Dropped over all parameters."""
    return (self.params - self.nonzero) / self.params


def sizes(params: Tree, kept: dict[str, int]) -> Sizes:
  """Counts of `params` (arrays or shape structs), with `kept` weights in the leaves named there."""
  total = prunable = nonzero = stored = 0
  for path, leaf in tree.named(params).items():
    size, itemsize = math.prod(leaf.shape), np.dtype(leaf.dtype).itemsize
    left = kept.get(path, size)
    # A leaf at density 1 needs no mask.
    mask_bytes = 0 if left == size else math.ceil(size / 8)
    total, nonzero = total + size, nonzero + left
    prunable += size if path in kept else 0
    stored += left * itemsize + mask_bytes
  return Sizes(total, prunable, nonzero, stored)
