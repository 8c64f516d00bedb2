"""The one matrix multiplication with parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_lm.core.format import Format
from sparse_lm.kernels.matmul import matmul
from sparse_lm.kernels.scale import scaled
from sparse_lm.layers.init import INITS
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


class Linear(nn.Module):
  """`x @ kernel (+ bias)`, float32 kernel `[in, features]`, output in `spec.precision`.

  Attributes:
    features: outputs (heads folded in).
    role: of the kernel for its initialisation, see `layers/init.py`.
  """

  spec: Spec
  features: int
  role: str = 'in'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., in]` to `[..., features]`."""
    spec = self.spec
    x = record.site(self, 'input', x.astype(spec.compute), kernel='kernel')
    if run := self.packed():
      return record.site(self, 'output', run(x))
    record.packable(self.path, 'kernel', 'bias')
    init = INITS[spec.init](self.role, spec.layers)
    kernel = self.param('kernel', init, (x.shape[-1], self.features), jnp.float32)
    y = matmul(x, kernel.astype(spec.compute))
    y = record.matmul(y, self.path, 'linear', 2 * x.size * self.features, kernel='kernel')
    if spec.bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
      y = y + bias.astype(spec.compute)
    return record.site(self, 'output', y)

  @property
  def stored(self) -> tuple[jax.Array, jax.Array | None] | None:
    """The kernel and the bias, which may be `None`, as parameters; `None` where they are packed."""
    if not self.has_variable('params', 'kernel'):
      return None
    bias = self.get_variable('params', 'bias') if self.spec.bias else None
    return self.get_variable('params', 'kernel'), bias

  @property
  def gathers(self) -> bool:
    """Whether packed weights are of a format that reads those of non-zero inputs alone."""
    return (
      self.has_variable('packed', 'kernel') and self.get_variable('packed', 'kernel').selects == -2
    )

  def packed(self) -> 'PackedLinear | None':
    """What it computes with packed weights, as plain functions; `None` where they are not packed."""
    if not self.has_variable('packed', 'kernel'):
      return None
    bias = self.get_variable('packed', 'bias') if self.spec.bias else None
    return PackedLinear(self.get_variable('packed', 'kernel'), bias, self.spec.compute)


def fused_projections(
  module: nn.Module, spec: Spec, x: jax.Array, features: dict[str, int]
) -> list[jax.Array]:
  """Linear layers of the same inputs, by name: `[..., features]` each. `module` is what calls this.

  Packed they can be one, which a CPU multiplies at more of its memory's bandwidth than several smaller
  ones. Units that were removed were removed of all alike.
  """
  fused = '_'.join(features)
  if not module.has_variable('packed', fused):
    record.fused(module.path, fused, features)
    return [Linear(spec, count, name=name)(x) for name, count in features.items()]
  y = Linear(spec, sum(features.values()), name=fused)(x)
  ends = np.cumsum(list(features.values())) * y.shape[-1] // sum(features.values())
  # Each part is a site of the name that it has where none is fused.
  parts = zip(features, jnp.split(y, ends[:-1], axis=-1))
  return [record.site(module, f'{name}/output', part) for name, part in parts]


@dataclasses.dataclass(frozen=True)
class PackedLinear:
  """A linear layer whose weights are packed.

  Attributes:
    bias: `[features]`, or none.
    dtype: of what it returns.
  """

  kernel: Format
  bias: jax.Array | None
  dtype: jnp.dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., in]` to `[..., features]`."""
    return self.biased(self.kernel.matmul(x))

  def biased(self, y: jax.Array) -> jax.Array:
    """`[..., features]` and the bias."""
    return (y if self.bias is None else y + self.bias).astype(self.dtype)

  def of_outputs(self, x: jax.Array, index_K: jax.Array) -> jax.Array:
    """The outputs of one token at `index`, int32, sorted and without repeats: `[..., K]`."""
    y = self.kernel.of_outputs(x.reshape(-1), index_K).reshape(*x.shape[:-1], -1)
    return (y if self.bias is None else y + self.bias[index_K]).astype(self.dtype)

  def of_inputs(self, x: jax.Array, index_K: jax.Array) -> jax.Array:
    """What the K inputs of one token at `index` add to its outputs, without the bias."""
    return self.kernel.of_inputs(x.reshape(-1), index_K).reshape(*x.shape[:-1], -1)


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, as `spec.norm` says; statistics in float32."""

  spec: Spec

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., D]` to `[..., D]` in `spec.precision`."""
    spec = self.spec
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), jnp.float32)
    y = x.astype(jnp.float32)
    if spec.norm == 'layernorm':
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-5)
    if not (spec.norm == 'layernorm' and spec.bias):
      return scaled(y, scale, spec.compute)
    y = y * scale + self.param('bias', nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    return y.astype(spec.compute)
