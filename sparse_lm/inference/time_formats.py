"""Measures the costs of packed formats on this device.

Products of one token with packed and dense kernels are timed in turns, for several sizes and densities,
in the dtype of models on this device. A line is fitted to the times of each format: a time per byte
that is read, plus a time per product.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core.format import Format
from sparse_lm.inference import formats
from sparse_lm.inference.costs import FormatCost
from sparse_lm.layers.spec import AUTO, precision_here
from sparse_lm.measure import turns

CACHES = 64_000_000  # bytes that are read before each turn, so that kernels are not in a cache


@dataclasses.dataclass(frozen=True)
class Cases:
  """The cases to time on a kind of device.

  Attributes:
    shapes: shapes of the kernels, `(inputs, outputs)`.
    densities: densities of the kernels, for formats that do not store every weight.
    kernels: least number of kernels per call, so that the overhead of a call is small.
    bytes: a call has enough kernels for this many bytes of dense weights, but at most `most` kernels.
    most: largest number of kernels per call.
    masks: number of different masks among the kernels of a call.
    calls: number of times that the device repeats the products in a turn; the host waits only at the end.
    flood: whether caches are filled with other data before each turn.
  """

  shapes: Sequence[tuple[int, int]]
  densities: Sequence[float] = (0.5, 0.25, 0.1)
  kernels: int = 8
  bytes: int = 0
  most: int = 8
  masks: int = 8
  calls: int = 1
  flood: bool = True

  def count(self, shape: tuple[int, int], dtype: np.dtype) -> int:
    """Returns the number of kernels of this shape per call."""
    enough = -(-self.bytes // (math.prod(shape) * dtype.itemsize))
    return min(max(self.kernels, enough), self.most)


ON_CPU = Cases(((128, 512), (256, 1024), (384, 3072), (768, 768), (768, 3072)))
# A product takes less time than its launch by the host. So the device repeats the products by itself,
# with more kernels than its caches can hold.
ON_GPU = Cases(
  ((480, 4096), (2048, 8192)),
  densities=(0.1,),
  bytes=CACHES,
  most=16,
  masks=1,
  calls=20,
  flood=False,
)


@dataclasses.dataclass(frozen=True)
class Times:
  """The times of one case.

  Attributes:
    read: bytes that a product reads from a kernel in its format.
    dense: bytes of a dense kernel of the same shape.
    seconds: seconds per product in each turn.
  """

  read: float
  dense: float
  seconds: np.ndarray


class _Products(turns.Prepared):
  """Products of one token with kernels that are in no cache of the processor."""

  def __init__(
    self, kernels: Sequence[Format], cases: Cases, read: np.ndarray | None = None
  ) -> None:
    """Prepares kernels; `read` has the indices of nonzero inputs, for formats that read only these."""
    self.kernels = jax.device_put(list(kernels))
    self.x = jnp.ones((1, kernels[0].shape[0]), dtype())
    self.index = None if read is None else jnp.asarray(read)
    self.flood = jnp.ones(CACHES // 4 if cases.flood else 1)
    self.calls = cases.calls
    self.multiply, self.sum = jax.jit(_multiply, static_argnums=3), jax.jit(jnp.sum)

  def prepare(self) -> jax.Array:
    """Fills the caches with other data."""
    return self.sum(self.flood)

  def __call__(self) -> jax.Array:
    """Returns the sum of the products."""
    return self.multiply(self.kernels, self.x, self.index, self.calls)


def _multiply(
  kernels: list[Format], x: jax.Array, index: jax.Array | None, calls: int
) -> jax.Array:
  def again(_: int, last: jax.Array) -> jax.Array:
    return _one_by_one(kernels, *_after(last, x, index))

  return jax.lax.fori_loop(1, calls, again, _one_by_one(kernels, x, index))


def _one_by_one(kernels: list[Format], x: jax.Array, index: jax.Array | None) -> jax.Array:
  """Returns the sum of the products; each product depends on the one before, as in a model."""
  total = jnp.zeros(kernels[0].shape[1], x.dtype)
  for kernel in kernels:
    y = kernel.matmul(x)[0] if index is None else kernel.of_inputs(x[0, index], index)
    x, index = _after(y, x, index)
    total += y
  return total


def _after(
  last: jax.Array, x: jax.Array, index: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Makes the inputs depend on the last result, by adding a zero that the compiler cannot foresee."""
  nothing = jnp.isnan(last[0])
  return x + nothing, None if index is None else index + nothing


def dtype() -> np.dtype:
  """Returns the default dtype of models on this device."""
  return jnp.dtype(precision_here(AUTO))


def measure(repeats: int = 15, cases: Cases | None = None) -> dict[str, FormatCost]:
  """Measures the costs of all formats that multiply single (not stacked) kernels.

  Args:
    repeats: number of turns per case.
    cases: the cases to time; by default those of this kind of device.
  """
  cases = cases or (ON_CPU if jax.default_backend() == 'cpu' else ON_GPU)
  reference = _reference(cases.shapes)
  dense = fit_line(_times(reference, reference, repeats, cases)[0])
  found = {}
  for name in formats.names():
    cls = formats.load(name)
    if cls.runs and not cls.stacks:
      own, beside = _times(cls, reference, repeats, cases)
      if own:
        found[name] = fit_line(own, beside, dense)
  return found


def _reference(shapes: Sequence[tuple[int, int]]) -> type[Format]:
  """Returns the format that stores every weight of any kernel."""
  plain = [cls for cls in map(formats.load, formats.names()) if cls.plain and cls.runs]
  return next(cls for cls in plain if not any(cls.refuses(np.ones(s, bool)) for s in shapes))


def _times(
  cls: type[Format], reference: type[Format], repeats: int, cases: Cases
) -> tuple[list[Times], list[Times]]:
  """Times a format in all cases that it supports; returns its times and the dense format's times."""
  draw, own, beside = np.random.default_rng(0), [], []
  for shape in cases.shapes:
    count = cases.count(shape, dtype())
    for density in (1.0,) if cls.plain else cases.densities:
      masks = [cls.example(draw, shape, density) for _ in range(min(cases.masks, count))]
      if any(map(cls.refuses, masks)):
        continue
      few = draw.standard_normal(2**16, np.float32).astype(dtype())  # the values do not matter
      kernels = [np.resize(few, shape) for _ in masks]
      packed = [cls.pack(kernel, mask) for kernel, mask in zip(kernels, masks)]
      whole = [reference.pack(kernel, np.ones(shape, bool)) for kernel in kernels]
      packed, whole = ([*itertools.islice(itertools.cycle(a), count)] for a in (packed, whole))
      share, index = 1.0, None
      if cls.selects == -2:
        index = np.sort(draw.permutation(shape[0])[: round(density * shape[0])])
        share = density
      calls = {'packed': _Products(packed, cases, index), 'dense': _Products(whole, cases)}
      seconds = turns.interleaved(calls, repeats, formats.name_of(packed[0]))
      bytes_ = [float(np.mean([kernel.nbytes for kernel in each])) for each in (packed, whole)]
      products = count * cases.calls
      own.append(Times(share * bytes_[0], bytes_[1], seconds['packed'] / products))
      beside.append(Times(bytes_[1], bytes_[1], seconds['dense'] / products))
  return own, beside


def fit_line(
  times: Sequence[Times],
  beside: Sequence[Times] | None = None,
  dense: FormatCost | None = None,
) -> FormatCost:
  """Fits a line to times, by least squares of relative errors.

  Args:
    times: times of a format.
    beside: times of the dense format in the same turns; `None` for the dense format itself.
    dense: line of the dense format; `None` for the dense format itself.

  Returns:
    `slowdown` and `fixed`, not negative, in units of the time per dense byte. For a single case, both are
    those of the dense format, times a common factor.
  """
  read = np.array([case.read for case in times])
  if beside is None:
    took = np.array([np.median(case.seconds) for case in times])
  else:
    # Ratios per turn do not change if the machine is slower for a while.
    ratios = [np.median(own.seconds / other.seconds) for own, other in zip(times, beside)]
    took = np.array(ratios) * np.array([case.dense + dense.fixed for case in times])
  if len(times) == 1 and dense is not None:
    factor = took[0] / (read[0] + dense.fixed)
    return FormatCost(float(factor), float(factor * dense.fixed))
  design = np.stack([read, np.ones_like(read)], axis=1) / took[:, None]
  slope, constant = np.linalg.lstsq(design, np.ones_like(read))[0]
  if constant < 0:
    slope, constant = np.mean(took / read), 0.0
  if beside is None:
    return FormatCost(1.0, float(constant / slope))
  return FormatCost(float(max(slope, 0.0)), float(constant))
