"""The model's dimensions and policies, shared by every module. Hashable, so modules are too."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.kernels import device
from sparse_lm.kernels.attention import KERNELS
from sparse_lm.layers.init import INITS

NORMS = ('rmsnorm', 'layernorm')
POSITIONS = ('rotary', 'learned')
NO_REMAT = 'none'
# What a layer keeps for its backward pass, which computes the rest again: its input alone; the results of
# all matmuls; the results of matmuls with weights, but not the scores of attention.
REMAT = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_saveable,
  'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
AUTO = 'auto'
PRECISIONS = (AUTO, 'float32', 'bfloat16')
SCAN_LAYERS = (AUTO, 'always', 'never')


@dataclasses.dataclass(frozen=True)
class Spec:
  """`config.model` plus what the data decides. Sizes in units, `dropout` a probability.

  Attributes:
    vocab: tokens.
    context: longest sequence (rows of learned positions).
    precision: 'float32' or 'bfloat16', the dtype of the computation. Parameters, norms, softmax, routers
      and losses are float32 with either.
    attention_kernel: one of `kernels.attention.KERNELS`.
    remat: which activations the backward pass computes again, 'none' or a key of `REMAT`.
    scan_layers: whether equal layers run as one scan, one of `SCAN_LAYERS`; see `model/scanned.py`.
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
  precision: str
  attention_kernel: str
  remat: str
  scan_layers: str

  @classmethod
  def from_config(cls, config: ConfigDict, vocab: int, context: int) -> 'Spec':
    """Reads `config.model`. Raises UserError where its fields do not fit each other.

    The precision 'auto' is replaced by that of this device, see `precision_here`.
    """
    spec = cls(vocab=vocab, context=context, **config)
    spec._check()
    return dataclasses.replace(spec, precision=precision_here(spec.precision))

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
    choices |= {'precision': PRECISIONS, 'attention_kernel': KERNELS, 'scan_layers': SCAN_LAYERS}
    for field, valid in (choices | {'remat': (NO_REMAT, *REMAT)}).items():
      if getattr(self, field) not in valid:
        raise unknown(f'config.model.{field}', getattr(self, field), valid)

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.width // self.heads

  @property
  def compute(self) -> jnp.dtype:
    """dtype of activations."""
    return jnp.dtype(self.precision)


def precision_here(asked: str) -> str:
  """The precision that `config.model.precision` stands for on this device: 'float32' or 'bfloat16'.

  'auto' is bfloat16 where that is fast, and float32 elsewhere; any other value stays as it is.
  """
  if asked != AUTO:
    return asked
  return 'bfloat16' if device.has_fast_bfloat16() else 'float32'


def _divisors(n: int) -> str:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return ', '.join(map(str, sorted({*small, *(n // d for d in small)})))
