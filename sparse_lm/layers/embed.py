"""Token and position embeddings, and the output head."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.errors import UserError
from sparse_lm.kernels.cross_entropy import Head, Readout
from sparse_lm.kernels.matmul import matmul
from sparse_lm.layers.init import INITS
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


class Embed(nn.Module):
  """Token embedding and output head, with optional learned positions and bigram logits (see `spec`)."""

  spec: Spec

  def setup(self) -> None:
    spec = self.spec
    # A tied table is also the head, so it gets the smaller initialisation.
    init = INITS['gpt2' if spec.tied else spec.init]('embed', spec.layers)
    self.tokens = self.param('tokens', init, (spec.vocab, spec.width), spec.stored)
    if spec.positions == 'learned':
      init = INITS['gpt2']('embed', spec.layers)
      self.positions = self.param('positions', init, (spec.context, spec.width), spec.stored)
    if not spec.tied:
      self.head = Linear(spec, spec.vocab, role='head')
    if spec.bigram:
      init = nn.initializers.uniform(0.02)
      self.bigrams = self.param('bigrams', init, (spec.vocab, spec.vocab), spec.stored)

  def __call__(self, tokens_BxL: jax.Array, positions_BxL: jax.Array | None) -> jax.Array:
    """Embeds int32 tokens `[B, L]`; returns `[B, L, D]`. `placed` documents the positions."""
    x_BxLxD = record.matmul(self.tokens[tokens_BxL], self.path, 'lookup', 0, kernel='tokens')
    if self.spec.embed_scale != 1:
      x_BxLxD = x_BxLxD.astype(jnp.float32) * self.spec.embed_scale
    return self.placed(x_BxLxD, positions_BxL)

  def placed(self, x_BxLxD: jax.Array, positions_BxL: jax.Array | None) -> jax.Array:
    """Adds learned positions, if the model has them, and casts to `spec.precision`; returns `[B, L, D]`.

    Args:
      x_BxLxD: token embeddings.
      positions_BxL: int32; `None` means 0, 1, 2, ... in every sequence. Then the gradient of the
        positions is a sum over sequences, which is faster than the scatter-add of a lookup.
    """
    if self.spec.positions == 'learned':
      in_order = positions_BxL is None
      row_BxLxD = (
        self.positions[None, : x_BxLxD.shape[1]] if in_order else self.positions[positions_BxL]
      )
      x_BxLxD = x_BxLxD + record.matmul(row_BxLxD, self.path, 'lookup', 0, kernel='positions')
    return x_BxLxD.astype(self.spec.compute)

  def predicted(
    self, x_BxLxD: jax.Array, tokens_BxL: jax.Array | None, readout: bool = False
  ) -> jax.Array | Readout:
    """Returns logits for each next token, float32 `[B, L, V]`, or a `Readout`.

    Args:
      x_BxLxD: outputs of the last norm.
      tokens_BxL: int32, the input tokens, which index the bigram table.
      readout: whether to return a `Readout`, from which the loss computes logits in chunks. Logits are
        returned anyway if the head is packed, or if its output is a site that is read or replaced.

    Raises:
      UserError: the model has a bigram table, but its input is not tokens.
    """
    if self.spec.bigram and tokens_BxL is None:
      raise UserError(
        'config.model.bigram=True: the bigram table needs tokens, but the model was called with '
        'embeddings or a residual stream; valid: False'
      )
    if self.spec.logit_scale != 1:
      x_BxLxD = (x_BxLxD.astype(jnp.float32) * self.spec.logit_scale).astype(x_BxLxD.dtype)
    head = self._head() if readout else None
    if head is not None:
      return self._readout(x_BxLxD, tokens_BxL, head)
    logits_BxLxV = self._logits(x_BxLxD)
    if not self.spec.bigram:
      return logits_BxLxV
    row_BxLxV = self.bigrams[tokens_BxL].astype(jnp.float32)
    return logits_BxLxV + record.matmul(row_BxLxV, self.path, 'lookup', 0, kernel='bigrams')

  def _logits(self, x_BxLxD: jax.Array) -> jax.Array:
    """Returns float32 logits `[B, L, V]` for `[B, L, D]`."""
    if not self.spec.tied:
      return self.head(x_BxLxD).astype(jnp.float32)
    x_BxLxD = record.site(self, 'head/input', x_BxLxD, kernel='tokens')
    logits_BxLxV = matmul(x_BxLxD, self.tokens.astype(self.spec.compute).T)
    flops = 2 * x_BxLxD.size * self.spec.vocab
    logits_BxLxV = record.matmul(logits_BxLxV, self.path, 'linear', flops, kernel='tokens')
    return record.site(self, 'head/output', logits_BxLxV).astype(jnp.float32)

  def _head(self) -> Head | None:
    """Returns the head's parameters; `None` if the logits cannot be computed in chunks."""
    bigrams = self.bigrams if self.spec.bigram else None
    if record.wanted(self, 'head/output'):
      return None
    if self.spec.tied:
      return Head(table_VxD=self.tokens, bigrams_VxV=bigrams)
    if self.head.stored is None:
      return None
    kernel_DxV, bias_V = self.head.stored
    return Head(kernel_DxV, bias_V=bias_V, bigrams_VxV=bigrams)

  def _readout(self, x_BxLxD: jax.Array, tokens_BxL: jax.Array, head: Head) -> Readout:
    """Returns the inputs of a chunked loss. The head's matmuls run in the loss but are charged here."""
    if self.spec.tied:
      module, point, kernel = self, 'head/input', 'tokens'
    else:
      module, point, kernel = self.head, 'input', 'kernel'
    x_BxLxD = record.site(module, point, x_BxLxD.astype(self.spec.compute), kernel=kernel)
    flops = 2 * x_BxLxD.size * self.spec.vocab
    x_BxLxD = record.matmul(x_BxLxD, module.path, 'linear', flops, kernel=kernel)
    if not self.spec.bigram:
      return Readout(x_BxLxD, head)
    x_BxLxD = record.matmul(x_BxLxD, self.path, 'lookup', 0, kernel='bigrams')
    return Readout(x_BxLxD, head, tokens_BxL)
