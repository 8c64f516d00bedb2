"""Attention to the own block of keys and to a few earlier blocks that each query chooses."""

import functools
from collections.abc import Callable

import jax

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels import blocks
from sparse_lm.kernels.attention import Blocks, KeyValues, Mask
from sparse_lm.kernels.topk import top, topk_rows
from sparse_lm.layers.attention import AttentionLayer, MaskedAttention, charge_attention
from sparse_lm.layers.method import Traits
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record

DISPLAY_NAME = 'MoBA'


class MoBA(MaskedAttention):
  """Softmax over `k` blocks of keys: the query's own block, and earlier blocks with the best mean key.

  Consecutive keys form a block; keys of tokens that skip the layer are not counted. A query reads its own
  block up to its own position, and those `k` - 1 complete earlier blocks whose mean key has the largest
  product with the query (float32, not scaled; ties go to the earlier block). No gradient flows through
  the choice. Training and evaluation compute all scores and mask most of them. Decoding reads the chosen
  blocks and the means of all blocks.

  Attributes:
    block: keys in a block.
    k: blocks that a query reads, its own block included.
  """

  block: int = ranged(4, '[1, 2^31)')
  k: int = ranged(3, '[1, 2^31)')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Lu et al. 2025 (MoBA: Mixture of Block Attention for Long-Context LLMs)',
      saves='scores and values of the other blocks; decoding reads only the chosen blocks',
      twin='full',
    )

  @property
  def layer(self) -> Callable[..., AttentionLayer]:
    """The usual layer, with a cache that also keeps the mean key of each block."""
    return functools.partial(super().layer, block=self.block)

  def check(self) -> None:
    """Raises UserError if `block` does not divide the context, or the context has too few blocks."""
    context = self.spec.context
    valid = f'a divisor of config.data.context, {context}'
    require(context % self.block == 0, 'config.attention.block', self.block, valid)
    most = context // self.block
    valid = f'1 to {most}, the blocks of {self.block} in config.data.context, {context}'
    require(self.k <= most, 'config.attention.k', self.k, valid)

  def __call__(self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str) -> jax.Array:
    """Returns `[B, L, H, K]`; see `MaskedAttention`."""
    scores_BxGxRxLxN = self._scores(tokens, q_BxLxHxK, keys)
    most = min(self.k, scores_BxGxRxLxN.shape[-1])
    if keys.means is not None and q_BxLxHxK.shape[1] == 1:
      return self._read_chosen(q_BxLxHxK, keys, top(scores_BxGxRxLxN, most)[1])
    chosen = topk_rows(scores_BxGxRxLxN, most) & (scores_BxGxRxLxN > -jax.numpy.inf)
    of_keys = blocks.key_ranks(keys.positions, keys) // self.block
    mask = Mask(blocks=Blocks(chosen, self.block, self.k, of_keys))
    return self.attend(tokens, q_BxLxHxK, keys, mode, mask)

  def _scores(self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues) -> jax.Array:
    """The score of each block for each query, float32 `[B, G, H / G, L, N]`."""
    kept = keys.means is not None
    means_BxNxGxK = keys.means if kept else blocks.means(keys, self.block)
    own_BxL = blocks.key_ranks(tokens.positions, keys) // self.block
    scores = blocks.block_scores(*map(jax.lax.stop_gradient, (q_BxLxHxK, means_BxNxGxK)), own_BxL)
    queries, held, count = q_BxLxHxK.shape[1], keys.k.shape[1], scores.shape[-1]
    past = sum(place // self.block for place in range(held - queries, held)) / queries
    flops = 2 * q_BxLxHxK.size * count
    scores = record.matmul(scores, self.path, 'choice', flops, causal=min(past, count) / count)
    return record.read(scores, self.path, 'means', keys.means.nbytes) if kept else scores

  def _read_chosen(
    self, q_Bx1xHxK: jax.Array, keys: KeyValues, chosen_BxGxRx1xN: jax.Array
  ) -> jax.Array:
    """Attends with one query of each sequence to the blocks that its heads chose: `[B, 1, H, K]`."""
    b, _, h, _ = q_Bx1xHxK.shape
    chosen_BxHxN = chosen_BxGxRx1xN.reshape(b, h, -1)
    read = chosen_BxHxN.shape[-1] * self.block
    q_Bx1xHxK = charge_attention(q_Bx1xHxK, self.path, read, Mask())
    for kind, held in (('keys', keys.k), ('values', keys.v)):
      nbytes = q_Bx1xHxK.size * read * held.dtype.itemsize
      q_Bx1xHxK = record.read(q_Bx1xHxK, self.path, kind, nbytes)
    on_weights = record.hook(self, 'weights')
    return blocks.attend_to_blocks(q_Bx1xHxK, keys, chosen_BxHxN, self.block, on_weights)
