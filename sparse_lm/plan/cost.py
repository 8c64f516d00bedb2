"""The cost ledger: the matmuls of a forward pass, the gates that may skip them, and their total costs.

Modules mark matmuls with `record.matmul`, and `plan/executed.py` collects the marks from the traced
program. So a matmul in a loop is charged once per iteration. FLOPs are summed over the traced call and
divided by its tokens, so a layer that processes fewer tokens is charged less. Matmuls inside
`record.gated` are charged at the fraction at which their gate is open.
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
  """The declaration of a method that gates computation.

  Attributes:
    planned: the fraction of the gated computation that runs, according to the config. It is used until
      the fraction is measured.
    controlled: whether the budget controller can change the fraction.
    skips: whether decoding skips computation behind closed gates. (A head gate, for example, only
      multiplies by zero.)
  """

  planned: float = 1.0
  controlled: bool = False
  skips: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(Gating):
  """A gate that may skip matmuls.

  Attributes:
    path: path of the gate's module. It sows `active` into `gates`: the fraction of its units that are
      open for each token, float32 `[B, L]`.
  """

  path: str


@dataclasses.dataclass(frozen=True)
class Matmul:
  """One matmul of the forward pass.

  Attributes:
    kind: 'linear', or another kind, such as 'scores' of attention.
    flops: multiplications plus additions of the traced call, with all gates open.
    kernel: path of the parameter; `None` if two activations are multiplied.
    gates: the gates that may skip the matmul, outermost first.
    causal: for attention, the fraction of the FLOPs that belongs to pairs with a key at or before the
      query.
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
  """Bytes that decoding reads from a layer's cache.

  Attributes:
    nbytes: bytes of the traced call, with all gates open.
    gates: the gates that may skip the read, outermost first.
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
  """Returns the FLOPs of the ledger, with each kernel at its density and each gate at its open fraction.

  Args:
    ledger: the matmuls.
    density: density by the path of a kernel; 1 for other kernels. May be traced.
    activity: result of `open_fractions`; gates that are missing count at their planned fraction. If
      nested gates have no joint fraction, the product of their fractions is used. May be traced.
  """
  return sum(
    m.flops * density.get(m.kernel, 1.0) * _active(m, activity or {}) for m in ledger.values()
  )


def read_bytes(reads: Reads, activity: Mapping[str, Fraction] | None = None) -> Fraction:
  """Returns the bytes read from caches, with each gate at its open fraction (see `forward_flops`)."""
  return sum(read.nbytes * _active(read, activity or {}) for read in reads.values())


def _active(own: Matmul | Read, activity: Mapping[str, Fraction]) -> Fraction:
  separate = math.prod(activity.get(gate.path, gate.planned) for gate in own.gates)
  return activity.get(_joint(own.gates), separate)


def open_fractions(ledger: Ledger | Reads, active: Mapping[str, Array]) -> dict[str, Array]:
  """Returns the open fraction of each gate, and the joint open fraction of nested gates.

  Nested gates are multiplied token by token before the mean is taken, because gates that open for the
  same tokens run more than the product of their means.

  Args:
    ledger: the matmuls, whose gates are considered.
    active: open fractions per token by the path of a gate: `[B, L]`, or an array that broadcasts to it.

  Returns:
    Scalars by the path of a gate, or by the paths of nested gates joined by `&`, outermost first. Gates
    that were not measured are omitted.
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
  """Returns the fraction of each kernel's weights that are multiplied per token, by path; at most 1.

  Args:
    ledger: FLOPs per token.
    sizes: number of weights of each kernel.
    active: as in `open_fractions`; gates that are missing count at their planned fraction.
    skips: returns whether decoding skips the computation behind a gate; other gates count as open.
  """
  kept = {
    path: dataclasses.replace(m, gates=tuple(filter(skips, m.gates))) for path, m in ledger.items()
  }
  measured = open_fractions(kept, active or {})
  multiplied = {m.kernel: m for m in kept.values() if m.kernel is not None}
  flops = {path: float(forward_flops({'': m}, {}, measured)) for path, m in multiplied.items()}
  return {path: min(1.0, flops[path] / (2 * sizes[path])) for path in flops}


def active_params(ledger: Ledger, density: dict[str, float], activity: dict[str, float]) -> float:
  """Returns the weights that are multiplied per token: half the FLOPs of the matmuls with parameters."""
  linear = {path: m for path, m in ledger.items() if m.kernel is not None}
  return forward_flops(linear, density, activity) / 2


def flops_range(ledger: Ledger, density: dict[str, float]) -> tuple[float, float]:
  """Returns the FLOPs with all controlled gates closed, and with all of them open."""
  moved = {gate.path for m in ledger.values() for gate in m.gates if gate.controlled}
  closed, opened = (
    forward_flops(ledger, density, dict.fromkeys(moved, fraction)) for fraction in (0.0, 1.0)
  )
  return closed, opened


def causal_pairs(ledger: Ledger) -> Ledger:
  """Returns the ledger with attention charged only for the pairs of query and key that it reads."""
  return {path: dataclasses.replace(m, flops=m.flops * m.causal) for path, m in ledger.items()}


def ungated(ledger: Ledger) -> Ledger:
  """Returns the ledger without gates, for a pass that computes everything and multiplies by zero."""
  return {path: dataclasses.replace(m, gates=()) for path, m in ledger.items()}


def training_flops(
  forward: float, weight_gradient: float | None = None, passes: float = 1
) -> float:
  """Returns the FLOPs of a training step: forward passes, input gradients and weight gradients.

  Each of the three costs as much as a forward pass at the step's densities, unless the step needs the
  gradient of dropped weights, whose cost is dense. (RigL 2020, appendix H: on average
  `(3 f_S (T - 1) + 2 f_S + f_D) / T` with a mask update every T steps.)

  Args:
    forward: FLOPs of one forward pass.
    weight_gradient: FLOPs of the weight gradients; those of a forward pass by default.
    passes: number of forward passes, of which one is differentiated. Recomputation adds a fraction.
  """
  return (passes + 1) * forward + (forward if weight_gradient is None else weight_gradient)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Numbers of parameters and bytes.

  Attributes:
    params: number of parameters.
    prunable: number of parameters in leaves with a mask or a target density.
    nonzero: number of kept parameters.
    stored_bytes: bytes of the kept weights, plus one mask bit per weight of masked leaves.
  """

  params: int
  prunable: int
  nonzero: int
  stored_bytes: int

  @property
  def sparsity_prunable(self) -> float:
    """Dropped parameters as a fraction of prunable parameters."""
    return (self.params - self.nonzero) / max(self.prunable, 1)

  @property
  def sparsity_total(self) -> float:
    """Dropped parameters as a fraction of all parameters."""
    return (self.params - self.nonzero) / self.params


def sizes(params: Tree, kept: dict[str, int]) -> Sizes:
  """Returns the sizes of a model.

  Args:
    params: arrays or shape structs.
    kept: number of kept weights by the path of a leaf; other leaves are dense and not prunable.
  """
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
