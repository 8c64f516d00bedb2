"""Attention layers: projections and a cache around a method that decides which keys are read.

A method of the attention slot is an `AttentionMethod`. Most differ in a mask alone (`MaskedAttention`).
One with other projections, or another cache, gives its own layer.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.kernels.attention import KeyValues, Mask, Select, attention, computed_keys
from sparse_lm.layers import cache
from sparse_lm.layers.draws import Dropout
from sparse_lm.layers.embed import rotate
from sparse_lm.layers.linear import Linear, fused_projections
from sparse_lm.layers.method import LayerMethod
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record


class AttentionMethod(LayerMethod):
  """The base of attention methods: `(tokens, queries, keys, mode)` to `[B, L, H, K]`.

  `tokens` are the layer's normalised inputs, which gates may decide by; `keys` all that may be read.
  """

  spec: Spec

  @property
  def layer(self) -> 'Callable[..., AttentionLayer]':
    """What makes the layer around the method, as `layer(spec, method, name=...)`.

    It is asked of a module that belongs to no other. A method whose layer has other projections or
    another cache overrides it.
    """
    reach, context = self.traits.reach, self.spec.context
    cache_size = context if reach is None else min(reach, context)
    return functools.partial(AttentionLayer, cache_size=cache_size)


class MaskedAttention(AttentionMethod):
  """Softmax attention to the keys that a mask leaves, and that the scores then select."""

  @property
  def mask(self) -> Mask:
    """Which keys a query may read, whatever their scores."""
    return Mask()

  @property
  def most(self) -> int | None:
    """Keys of which a query reads the values at most, once their scores are known; `None` = all."""
    return None

  @property
  def select(self) -> Select | None:
    """Narrows the mask by the scores to `most` keys; `None` = the mask is all."""
    return None

  def __call__(self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str) -> jax.Array:
    """Returns `[B, L, H, K]`, of queries `[B, L, H, K]`, grouped where `keys` have fewer heads."""
    return self.attend(tokens, q_BxLxHxK, keys, mode, self.mask)

  @nn.compact
  def attend(
    self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str, mask: Mask
  ) -> jax.Array:
    """What `__call__` does, by a mask that may depend on the queries."""
    dropout = Dropout(self.spec.dropout, deterministic=mode != 'train')
    dropped = dropout.rate > 0 and not dropout.deterministic
    acts = [act for act in (dropout if dropped else None, record.hook(self, 'weights')) if act]
    q_BxLxHxK = note(q_BxLxHxK, self.path, keys.k.shape[1], mask, self.most)
    return attention(
      note_read(q_BxLxHxK, self.path, keys, self.most),
      tokens.positions,
      keys,
      mask,
      (lambda weights: functools.reduce(lambda w, act: act(w), acts, weights)) if acts else None,
      self.select,
      self.most,
      self.spec.attention_kernel,
    )


class AttentionLayer(nn.Module):
  """Projections, cache and output around an attention method: the usual ones.

  Attributes:
    method: makes the attention slot's module.
    cache_size: keys behind and including its own that a query reads at most, which decoding keeps.
    block: keys of a block, of which decoding keeps the mean too; `None` = there are no blocks.
  """

  spec: Spec
  method: Callable[[], AttentionMethod]
  cache_size: int
  block: int | None = None

  @nn.compact
  def __call__(self, tokens: Tokens, mode: str) -> jax.Array:
    """What attention makes of the tokens: `[B, L, D]`."""
    method = self.method()
    gating = method.traits.gating
    chosen = gating is not None
    record.units(self.path, 'head', self.spec.kv_heads, self.head_axes, dynamic=chosen)
    q_BxLxHxK, keys = self.project(tokens, mode)
    out_BxLxHxK = method(tokens, q_BxLxHxK, keys, mode)
    with record.gated(method.path, gating):
      return self.merge(out_BxLxHxK)

  @property
  def head_axes(self) -> dict[str, int]:
    """The axis of each kernel along which heads follow each other.

    Query heads that share a key head are pruned with it.
    """
    return {'query/kernel': -1, 'key/kernel': -1, 'value/kernel': -1, 'out/kernel': -2}

  def project(self, tokens: Tokens, mode: str) -> tuple[jax.Array, KeyValues]:
    """The tokens' queries `[B, L, H, K]`, and the keys that they may read: theirs, or all cached ones."""
    spec, (b, l, _) = self.spec, tokens.x.shape
    wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    features = {'query': wide, 'key': narrow, 'value': narrow}
    projected = fused_projections(self, spec, tokens.x, features)
    # Fewer heads where some were removed.
    q_BxLxHxK, k_BxLxGxK, v_BxLxGxK = (y.reshape(b, l, -1, spec.head_dim) for y in projected)
    if spec.positions == 'rotary':
      # Of whole sequences one table stands for all.
      places = jnp.arange(l, dtype=jnp.int32)[None] if tokens.whole else tokens.positions
      q_BxLxHxK, k_BxLxGxK = (rotate(a, places) for a in (q_BxLxHxK, k_BxLxGxK))
    q_BxLxHxK = record.site(self, 'q', q_BxLxHxK)
    k_BxLxGxK, v_BxLxGxK = record.site(self, 'k', k_BxLxGxK), record.site(self, 'v', v_BxLxGxK)
    if self.caches(mode):
      keep = functools.partial(cache.extend, self, self.cache_size, tokens, block=self.block)
      return q_BxLxHxK, keep(k_BxLxGxK, v_BxLxGxK)
    return q_BxLxHxK, KeyValues(k_BxLxGxK, v_BxLxGxK, tokens.positions, tokens.valid, tokens.whole)

  def merge(self, out_BxLxHxK: jax.Array) -> jax.Array:
    """The heads' outputs `[B, L, H, K]` to `[B, L, D]`."""
    out_BxLxF = out_BxLxHxK.reshape(*out_BxLxHxK.shape[:2], -1)
    return Linear(self.spec, self.spec.width, role='out', name='out')(out_BxLxF)

  def caches(self, mode: str) -> bool:
    """Whether sequences are decoded token by token, so that keys are to be kept."""
    return mode == 'decode' and self.is_mutable_collection('cache')


def note(
  q_BxLxHxK: jax.Array, path: tuple[str, ...], keys: int, mask: Mask, most: int | None = None
) -> jax.Array:
  """Returns the queries, marked with the cost of both matmuls of `attention`, by all pairs.

  Every query is charged with every key, those behind it included, because that is what dense attention
  computes before its mask. A method that reads fewer keys is charged with the share that it reads of
  the causal ones, so that a share means the same by both conventions; `cost.causal_pairs` turns the
  notes into exact counts of what is read. What the kernel computes beyond that is marked as uncharged.

  Args:
    keys: S.
    mask: keys that it leaves out by their distance are charged neither scores nor values.
    most: keys whose values are charged for each query, at most.
  """
  queries, pair = q_BxLxHxK.shape[1], 2 * q_BxLxHxK.size
  places = range(
    keys - queries, keys
  )  # the last ones: all of a sequence, or in decoding the newest
  within = [mask.count(place, keys) for place in places]
  there = sum(Mask(causal=mask.causal).count(place, keys) for place in places)
  scored, causal = sum(within) / there, there / (queries * keys)
  read = sum(count if most is None else min(count, most) for count in within) / there
  q_BxLxHxK = record.matmul(q_BxLxHxK, path, 'scores', pair * keys * scored, causal=causal)
  q_BxLxHxK = record.matmul(q_BxLxHxK, path, 'values', pair * keys * read, causal=causal)
  computed, charged = computed_keys(queries, keys, most), keys * (scored + read)
  return record.uncharged(q_BxLxHxK, 'keys that a query does not read', pair * (computed - charged))


def note_read(
  q_BxLxHxK: jax.Array, path: tuple[str, ...], keys: KeyValues, most: int | None = None
) -> jax.Array:
  """Returns the queries, marked with the bytes that `attention` reads of a cache, if the keys are one's.

  Args:
    most: see `attention`. Each head of a single query then gathers so many values of its own.
  """
  if not keys.cached:
    return q_BxLxHxK
  queries, held = q_BxLxHxK.shape[1], keys.k.shape[1]
  part = queries == 1 and most is not None and most < held
  values = q_BxLxHxK.size * most * keys.v.dtype.itemsize if part else keys.v.nbytes
  q_BxLxHxK = record.read(q_BxLxHxK, path, 'keys', keys.k.nbytes)
  return record.read(q_BxLxHxK, path, 'values', values)
