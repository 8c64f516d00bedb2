"""The model's dimensions and numerical options, which all modules share."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError, require, unknown
from sparse_lm.kernels import device
from sparse_lm.kernels.attention import KERNELS
from sparse_lm.layers.init import INITS

NORMS = RMSNORM, LAYERNORM = ('rmsnorm', 'layernorm')
ROTARY, LEARNED = POSITIONS = ('rotary', 'learned')
# RMSNorm of queries and keys: none, of each head, or of all heads together.
QUERY_KEY_NORMS = NO_NORM, OF_HEAD, OF_ALL = 'none', 'head', 'all'
ROPE_SCALINGS = UNSCALED, LINEAR, LLAMA3 = 'none', 'linear', 'llama3'
# What may have a bias of its own: linear layers by name, and 'norm' for every LayerNorm.
NORM = 'norm'
BIASED = ('query', 'key', 'value', 'out', 'gate', 'up', 'down', 'head', NORM)
WEIGHTS_DTYPES = ('float32', 'bfloat16')
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
    head_width: width of each head; 0 means `width / heads`.
    norm: one of `NORMS`.
    norm_epsilon: number that norms add to the mean square before the root.
    query_key_norm: one of `QUERY_KEY_NORMS`, which RMSNorm queries and keys go through before rotation.
    positions: one of `POSITIONS`.
    rope_base: base of the wavelengths of rotary positions.
    rope_fraction: fraction of each head's width that is rotated.
    rope_scaling: one of `ROPE_SCALINGS`, how rotary positions are stretched (`layers/rope.py`).
    rope_factor: factor of the stretched wavelengths.
    rope_low: with 'llama3', longer wavelengths than `rope_context / rope_low` are stretched.
    rope_high: with 'llama3', shorter wavelengths than `rope_context / rope_high` stay.
    rope_context: with 'llama3', context of the original model, in tokens.
    parallel_residual: whether the MLP reads the layer's input instead of the sum of this input and the
      output of attention.
    init: initialisation, a key of `layers.init.INITS`.
    tied: whether the head uses the token embedding's table.
    embed_scale: factor of the token embeddings.
    logit_scale: factor of the inputs of the head. Biases of the head and bigram logits are not scaled.
    bigram: whether the head adds logits from a table indexed by the input token.
    bias: whether linear layers and norms have a bias.
    biases: names from `BIASED` that have a bias although `bias` is False.
    dropout: dropout probability.
    precision: 'float32' or 'bfloat16', the dtype of most computation. Norms, softmax, routers and losses
      are float32 in any case.
    weights_dtype: 'float32' or 'bfloat16', the dtype of the parameters.
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
  head_width: int
  norm: str
  norm_epsilon: float
  query_key_norm: str
  positions: str
  rope_base: float
  rope_fraction: float
  rope_scaling: str
  rope_factor: float
  rope_low: float
  rope_high: float
  rope_context: int
  parallel_residual: bool
  init: str
  tied: bool
  embed_scale: float
  logit_scale: float
  bigram: bool
  bias: bool
  biases: tuple[str, ...]
  dropout: float
  precision: str
  weights_dtype: str
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
    if not self.head_width and self.width % self.heads:
      raise UserError(
        f'config.model.heads={self.heads} does not divide config.model.width={self.width}; '
        f'valid: {_divisors(self.width)}, or a width of the heads in config.model.head_width'
      )
    if self.heads % self.kv_heads:
      raise UserError(
        f'config.model.kv_heads={self.kv_heads} does not divide config.model.heads={self.heads}; '
        f'valid: {_divisors(self.heads)}'
      )
    choices = {'norm': NORMS, 'positions': POSITIONS, 'init': INITS}
    choices |= {'precision': PRECISIONS, 'attention_kernel': KERNELS, 'scan_layers': SCAN_LAYERS}
    choices |= {'query_key_norm': QUERY_KEY_NORMS, 'rope_scaling': ROPE_SCALINGS}
    choices |= {'weights_dtype': WEIGHTS_DTYPES, 'remat': (NO_REMAT, *REMAT)}
    for field, valid in choices.items():
      if getattr(self, field) not in valid:
        raise unknown(f'config.model.{field}', getattr(self, field), valid)
    self._check_rotary()
    self._check_biases()

  def _check_rotary(self) -> None:
    """Raises a UserError if the fields of rotary positions do not fit each other."""
    if self.positions != ROTARY:
      valid = f'{UNSCALED!r} with config.model.positions={self.positions!r}'
      scaling = self.rope_scaling
      require(scaling == UNSCALED, 'config.model.rope_scaling', scaling, valid)
      return
    if self.rotated % 2 or not self.rotated:
      part = '' if self.rope_fraction == 1 else f' ({self.rotated} rotated by rope_fraction)'
      raise UserError(
        f'config.model.heads={self.heads} gives heads of width {self.head_dim}{part}, but rotary '
        'positions need an even width; valid: another number of heads, or '
        f"config.model.positions='{LEARNED}'"
      )
    valid = f'1.0 with config.model.rope_scaling={UNSCALED!r}'
    scaled = self.rope_scaling != UNSCALED or self.rope_factor == 1
    require(scaled, 'config.model.rope_factor', self.rope_factor, valid)
    valid = f'a number above config.model.rope_low={self.rope_low}'
    ordered = self.rope_scaling != LLAMA3 or self.rope_high > self.rope_low
    require(ordered, 'config.model.rope_high', self.rope_high, valid)

  def _check_biases(self) -> None:
    """Raises a UserError if a name in `biases` is unknown, or adds no bias."""
    for name in self.biases:
      if name not in BIASED:
        raise unknown('name in config.model.biases:', name, BIASED)
    valid = '(), because config.model.bias=True gives all of them a bias'
    require(not (self.bias and self.biases), 'config.model.biases', self.biases, valid)
    valid = "names of linear layers; only config.model.norm='layernorm' has biases"
    alone = NORM in self.biases and self.norm != LAYERNORM
    require(not alone, 'config.model.biases', self.biases, valid)

  def has_bias(self, name: str) -> bool:
    """Returns whether the linear layers of this name have a bias; 'norm' stands for every LayerNorm."""
    return self.bias or name in self.biases

  @property
  def head_dim(self) -> int:
    """Width of each head."""
    return self.head_width or self.width // self.heads

  @property
  def rotated(self) -> int:
    """Number of dimensions of each head that rotary positions rotate."""
    return int(self.head_dim * self.rope_fraction)

  @property
  def compute(self) -> jnp.dtype:
    """The dtype of activations."""
    return jnp.dtype(self.precision)

  @property
  def stored(self) -> jnp.dtype:
    """The dtype of parameters."""
    return jnp.dtype(self.weights_dtype)


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
