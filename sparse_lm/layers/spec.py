"""The model's dimensions and numerical options, which all modules share."""

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
ROTARY, LEARNED = POSITIONS = ('rotary', 'learned')
NO_REMAT = 'none'
# What a layer saves for its backward pass, which recomputes the rest: only its input ('full'); the
# results of all matmuls ('dots'); or those of matmuls with weights, without attention
# ('dots_no_batch').
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
  """The fields of `config.model`, plus vocabulary and context. Hashable, as fields of modules must be.

  Attributes:
    vocab: number of tokens in the vocabulary.
    context: longest sequence, in tokens.
    layers: number of layers.
    width: width of the residual stream.
    hidden: hidden units of an MLP.
    heads: number of query heads.
    kv_heads: number of key/value heads.
    norm: one of `NORMS`.
    positions: one of `POSITIONS`.
    init: initialisation, a key of `layers.init.INITS`.
    tied: whether the head uses the token embedding's table.
    bigram: whether the head adds logits from a table indexed by the input token.
    bias: whether linear layers and norms have a bias.
    dropout: dropout probability.
    precision: 'float32' or 'bfloat16', the dtype of most computation. Parameters, norms, softmax, routers
      and losses are float32 in any case.
    attention_kernel: one of `kernels.attention.KERNELS`.
    remat: which activations the backward pass recomputes: 'none' or a key of `REMAT`.
    scan_layers: whether equal layers run as one scan: one of `SCAN_LAYERS` (see `model/scanned.py`).
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
    """Reads `config.model`; replaces the precision 'auto' by this device's (see `precision_here`).

    Raises:
      UserError: the fields do not fit each other.
    """
    spec = cls(vocab=vocab, context=context, **config)
    spec._check()
    return dataclasses.replace(spec, precision=precision_here(spec.precision))

  def _check(self) -> None:
    if self.width % self.heads:
      raise UserError(
        f'config.model.heads={self.heads} does not divide config.model.width={self.width}; '
        f'valid: {_divisors(self.width)}'
      )
    if self.heads % self.kv_heads:
      raise UserError(
        f'config.model.kv_heads={self.kv_heads} does not divide config.model.heads={self.heads}; '
        f'valid: {_divisors(self.heads)}'
      )
    if self.positions == ROTARY and self.head_dim % 2:
      raise UserError(
        f'config.model.heads={self.heads} gives heads of odd width {self.head_dim}, but rotary positions '
        f"need an even width; valid: another number of heads, or config.model.positions='{LEARNED}'"
      )
    choices = {'norm': NORMS, 'positions': POSITIONS, 'init': INITS}
    choices |= {'precision': PRECISIONS, 'attention_kernel': KERNELS, 'scan_layers': SCAN_LAYERS}
    for field, valid in (choices | {'remat': (NO_REMAT, *REMAT)}).items():
      if getattr(self, field) not in valid:
        raise unknown(f'config.model.{field}', getattr(self, field), valid)

  @property
  def head_dim(self) -> int:
    """Width of each head."""
    return self.width // self.heads

  @property
  def compute(self) -> jnp.dtype:
    """The dtype of activations."""
    return jnp.dtype(self.precision)


def precision_here(asked: str) -> str:
  """Returns the precision that `config.model.precision` means on this device.

  'auto' means 'bfloat16' on devices where it is fast, else 'float32'. Other values are returned
  unchanged.
  """
  if asked != AUTO:
    return asked
  return 'bfloat16' if device.has_fast_bfloat16() else 'float32'


def _divisors(n: int) -> str:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return ', '.join(map(str, sorted({*small, *(n // d for d in small)})))
