"""The cost ledger: every matmul notes itself beside its einsum while it is traced.

Notes live in a dict keyed by path, so that tracing twice counts once. `flops` are counted over the
whole traced call and divided by its tokens, so a layer that sees fewer tokens notes less.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sparse_lm.core import tree

Tree = Any


@dataclasses.dataclass(frozen=True)
class Matmul:
  """One matmul of the forward pass.

  Attributes:
    kind: 'linear', or what else ran ('attention').
    flops: multiplications and additions, over the traced call.
    kernel: path of the parameter that it multiplies with, `None` for activations with activations.
  """

  kind: str
  flops: float
  kernel: str | None = None


Ledger = dict[str, Matmul]
_open: contextvars.ContextVar[Ledger | None] = contextvars.ContextVar('ledger', default=None)


def note(path: tuple[str, ...], kind: str, flops: float, kernel: str | None = None) -> None:
  """Notes a matmul of the module at `path`; does nothing unless a ledger is open."""
  ledger = _open.get()
  if ledger is not None:
    name = '/'.join((*path, kind))
    ledger[name] = Matmul(kind, float(flops), None if kernel is None else '/'.join((*path, kernel)))


@contextlib.contextmanager
def recording() -> Iterator[Ledger]:
  """Opens a ledger for the traces inside."""
  token = _open.set({})
  try:
    yield _open.get()
  finally:
    _open.reset(token)


def forward_flops(ledger: Ledger, density: dict[str, float]) -> float:
  """FLOPs of the ledger with each kernel at its density (1 where not named)."""
  return sum(m.flops * density.get(m.kernel, 1.0) for m in ledger.values())


def training_flops(
  ledger: Ledger,
  target: dict[str, float],
  density: Callable[[float, int], float],
  dense_gradient: Callable[[int], bool],
  steps: int,
) -> float:
  """Mean FLOPs of a training step: forward, gradient of the inputs, gradient of the weights.

  Each costs as much as the forward pass at the density of that step, but where a step needs the
  gradient of dropped weights the last one is dense (RigL 2020, appendix H: on average
  `(3 f_S (T - 1) + 2 f_S + f_D) / T` with an update every T steps).
  """
  dense = forward_flops(ledger, {})
  total = 0.0
  seen: dict[tuple[float, ...], float] = {}
  for step in range(steps):
    # Once for each target: leaves of a uniform budget share theirs.
    densities = {final: float(density(final, step)) for final in set(target.values())}
    at = {path: densities[final] for path, final in target.items()}
    sparse = seen.setdefault(tuple(at.values()), forward_flops(ledger, at))
    total += 2 * sparse + (dense if dense_gradient(step) else sparse)
  return total / steps


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Counts of parameters and bytes.

  Attributes:
    params: all parameters.
    prunable: those in leaves with a mask or a target.
    nonzero: parameters left.
    stored_bytes: the kept weights and, for masked leaves, a bit for every weight.
    dense_bytes: the dense twin's.
  """

  params: int
  prunable: int
  nonzero: int
  stored_bytes: int
  dense_bytes: int

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
  total = prunable = nonzero = stored = dense = 0
  for path, leaf in tree.named(params).items():
    size, itemsize = math.prod(leaf.shape), np.dtype(leaf.dtype).itemsize
    left = kept.get(path, size)
    # A leaf at density 1 needs no mask.
    mask_bytes = 0 if left == size else math.ceil(size / 8)
    total, nonzero, dense = total + size, nonzero + left, dense + size * itemsize
    prunable += size if path in kept else 0
    stored += left * itemsize + mask_bytes
  return Sizes(total, prunable, nonzero, stored, dense)
