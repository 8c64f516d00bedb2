"""Linear layers and norms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_lm.core.format import Format
from sparse_lm.kernels.matmul import matmul
from sparse_lm.kernels.scale import scaled
from sparse_lm.layers.chunks import in_chunks
from sparse_lm.layers.init import INITS
from sparse_lm.layers.spec import LAYERNORM, NORM, Spec
from sparse_lm.plan import record


class Linear(nn.Module):
  """Computes `x @ kernel (+ bias)` in `spec.precision`; the kernel `[in, features]` is `spec.stored`.

  Attributes:
    features: number of outputs, over all heads.
    role: role of the kernel, which decides its initialisation (`layers/init.py`).
  """

  spec: Spec
  features: int
  role: str = 'in'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., in]` to `[..., features]`."""
    spec = self.spec
    x = record.site(self, 'input', x.astype(spec.compute), kernel='kernel')
    gating = record.gating(self, 'input')
    if run := self.packed():
      few = gating is not None and self.gathers and x.size == x.shape[-1]
      return record.site(self, 'output', run.of_nonzero(x, gating.planned) if few else run(x))
    record.packable(self.path, 'kernel', 'bias')
    init = INITS[spec.init](self.role, spec.layers)
    kernel = self.param('kernel', init, (x.shape[-1], self.features), spec.stored)
    y = matmul(x, kernel.astype(spec.compute))
    with record.gated(self.path, gating):
      y = record.matmul(y, self.path, 'linear', 2 * x.size * self.features, kernel='kernel')
    if spec.has_bias(self.name):
      bias = self.param('bias', nn.initializers.zeros, (self.features,), spec.stored)
      y = y + bias.astype(spec.compute)
    return record.site(self, 'output', y)

  @property
  def stored(self) -> tuple[jax.Array, jax.Array | None] | None:
    """The kernel and the bias (`None` without a bias); `None` if the weights are packed."""
    if not self.has_variable('params', 'kernel'):
      return None
    bias = self.get_variable('params', 'bias') if self.spec.has_bias(self.name) else None
    return self.get_variable('params', 'kernel'), bias

  @property
  def gathers(self) -> bool:
    """Whether the weights are packed in a format that can read only the weights of nonzero inputs."""
    return (
      self.has_variable('packed', 'kernel') and self.get_variable('packed', 'kernel').selects == -2
    )

  def packed(self) -> 'PackedLinear | None':
    """Returns the layer with packed weights; `None` if the weights are not packed."""
    if not self.has_variable('packed', 'kernel'):
      return None
    bias = self.get_variable('packed', 'bias') if self.has_variable('packed', 'bias') else None
    return PackedLinear(self.get_variable('packed', 'kernel'), bias, self.spec.compute)


def fused_projections(
  module: nn.Module, spec: Spec, x: jax.Array, features: dict[str, int]
) -> list[jax.Array]:
  """Applies several linear layers to the same inputs; returns `[..., features]` for each.

  Packing can store them as one matrix, because a CPU reads one large matrix at a higher bandwidth than
  several small ones. If packing removed units, it removed the same fraction from each layer.

  Args:
    module: the calling module.
    spec: the model's dimensions.
    x: the inputs.
    features: number of outputs of each layer, by the layer's name.
  """
  fused = '_'.join(features)
  if not module.has_variable('packed', fused):
    record.fused(module.path, fused, features)
    return [Linear(spec, count, name=name)(x) for name, count in features.items()]
  y = Linear(spec, sum(features.values()), name=fused)(x)
  ends = np.cumsum(list(features.values())) * y.shape[-1] // sum(features.values())
  # Each part is a site with the same name as without fusion.
  parts = zip(features, jnp.split(y, ends[:-1], axis=-1))
  return [record.site(module, f'{name}/output', part) for name, part in parts]


@dataclasses.dataclass(frozen=True)
class PackedLinear:
  """A linear layer with packed weights.

  Attributes:
    kernel: the packed kernel.
    bias: `[features]`, or `None`.
    dtype: dtype of the outputs.
  """

  kernel: Format
  bias: jax.Array | None
  dtype: jnp.dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., in]` to `[..., features]`."""
    return self.add_bias(self.kernel.matmul(x))

  def of_nonzero(self, x: jax.Array, planned: float) -> jax.Array:
    """Does the same as a call for one token, and reads only the weights of its nonzero inputs.

    Args:
      x: the inputs of one token.
      planned: expected fraction of nonzero inputs.
    """

    def some(index_K: jax.Array, live_K: jax.Array) -> jax.Array:
      return self.of_inputs(jnp.where(live_K, x[..., index_K], 0), index_K)

    return self.add_bias(in_chunks(x.reshape(-1) != 0, planned, some))

  def add_bias(self, y: jax.Array) -> jax.Array:
    """Adds the bias, if there is one, to outputs `[..., features]` and casts them to `dtype`."""
    return (y if self.bias is None else y + self.bias).astype(self.dtype)

  def of_outputs(self, x: jax.Array, index_K: jax.Array) -> jax.Array:
    """Returns the outputs `[..., K]` of one token at `index_K`, which is sorted and has no repeats."""
    y = self.kernel.of_outputs(x.reshape(-1), index_K).reshape(*x.shape[:-1], -1)
    return (y if self.bias is None else y + self.bias[index_K]).astype(self.dtype)

  def of_inputs(self, x: jax.Array, index_K: jax.Array) -> jax.Array:
    """Returns the outputs, without bias, of one token whose inputs are zero except `x` at `index_K`."""
    return self.kernel.of_inputs(x.reshape(-1), index_K).reshape(*x.shape[:-1], -1)


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis; statistics are computed in float32.

  Attributes:
    kind: one of `spec.NORMS`; '' means `spec.norm`.
  """

  spec: Spec
  kind: str = ''

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises `[..., D]`; the result is in `spec.precision`."""
    spec, centred = self.spec, (self.kind or self.spec.norm) == LAYERNORM
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), spec.stored)
    y, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    if centred:
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + spec.norm_epsilon)
    if not (centred and spec.has_bias(NORM)):
      return scaled(y, scale, spec.compute)
    y = y * scale + self.param('bias', nn.initializers.zeros, (x.shape[-1],), spec.stored)
    return y.astype(spec.compute)
