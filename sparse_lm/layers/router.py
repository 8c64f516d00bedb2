"""The small linear layer that computes the logits of routers, gates and predictors."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.kernels.matmul import matmul
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


class Router(nn.Module):
  """Computes `x @ kernel (+ bias)` in float32, whatever the model's precision (Switch 2021, section 2.4).

  Modules name it `router`, so that `config.weight.dense` keeps it dense.

  Attributes:
    features: number of units to decide about.
    scale: standard deviation of the normal initialisation, times 1/sqrt(in).
    bias: initial value of the bias; `None` means no bias.
  """

  spec: Spec
  features: int
  scale: float = 1.0
  bias: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32 logits `[..., features]` for `[..., D]`."""
    init = nn.initializers.normal(self.scale * x.shape[-1] ** -0.5)
    kernel = self.param('kernel', init, (x.shape[-1], self.features), self.spec.stored)
    x = record.site(self, 'input', x.astype(jnp.float32), kernel='kernel')
    logits = matmul(x, kernel.astype(jnp.float32))
    logits = record.matmul(logits, self.path, 'linear', 2 * x.size * self.features, kernel='kernel')
    if self.bias is not None:
      start = nn.initializers.constant(self.bias)
      logits += self.param('bias', start, (self.features,), self.spec.stored)
    return record.site(self, 'output', logits)
