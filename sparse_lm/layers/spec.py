"""The model's dimensions and policies, shared by every module. Hashable, so modules are too."""

import dataclasses
import math

import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.layers.init import INITS

NORMS = ('rmsnorm', 'layernorm')
POSITIONS = ('rotary', 'learned')
DTYPES = ('float32', 'bfloat16', 'float16')
# Gradients of float16 parameters are float16, which without loss scaling underflows and overflows.
PARAM_DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Spec:
  """`config.model` plus what the data decides. Sizes in units, `dropout` a probability.

  Attributes:
    vocab: tokens.
    context: longest sequence (rows of learned positions).
    dtype: of the computation; `param_dtype` of the stored parameters.
  """

  vocab: int
  context: int
  layers: int
  width: int
  hidden: int
  heads: int
  kv_heads: int
  norm: str
  positions: str
  init: str
  tied: bool
  bigram: bool
  bias: bool
  dropout: float
  dtype: str
  param_dtype: str
  remat: bool

  @classmethod
  def from_config(cls, config: ConfigDict, vocab: int, context: int) -> 'Spec':
    """Reads `config.model`. Raises UserError where its fields do not fit each other."""
    spec = cls(vocab=vocab, context=context, **config)
    spec._check()
    return spec

  def _check(self) -> None:
    if self.width % self.heads:
      raise UserError(
        f"config.model.heads={self.heads} doesn't divide config.model.width={self.width}; "
        f'valid: {_divisors(self.width)}'
      )
    if self.heads % self.kv_heads:
      raise UserError(
        f"config.model.kv_heads={self.kv_heads} doesn't divide config.model.heads={self.heads}; "
        f'valid: {_divisors(self.heads)}'
      )
    if self.positions == 'rotary' and self.head_dim % 2:
      raise UserError(
        f'config.model.heads={self.heads} leaves heads of odd width {self.head_dim}, which rotary '
        'positions cannot pair'
      )
    choices = {'norm': NORMS, 'positions': POSITIONS, 'init': INITS}
    for field, valid in (choices | {'dtype': DTYPES, 'param_dtype': PARAM_DTYPES}).items():
      if getattr(self, field) not in valid:
        raise unknown(f'config.model.{field}', getattr(self, field), valid)

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.width // self.heads

  @property
  def compute(self) -> jnp.dtype:
    """dtype of activations."""
    return jnp.dtype(self.dtype)

  @property
  def stored(self) -> jnp.dtype:
    """dtype of parameters."""
    return jnp.dtype(self.param_dtype)


def _divisors(n: int) -> str:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return ', '.join(map(str, sorted({*small, *(n // d for d in small)})))
