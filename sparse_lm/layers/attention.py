"""Attention layers: projections and a cache around a method that decides which keys are read.

A method of the attention slot is an `AttentionMethod`. Most methods differ only in their mask and derive
from `MaskedAttention`. A method with other projections or another cache defines its own layer.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.kernels.attention import KeyValues, Mask, Select, attention, computed_keys
from sparse_lm.layers import cache
from sparse_lm.layers.draws import Dropout
from sparse_lm.layers.linear import Linear, Norm, fused_projections
from sparse_lm.layers.method import LayerMethod
from sparse_lm.layers.rope import rotate
from sparse_lm.layers.spec import OF_ALL, OF_HEAD, RMSNORM, Spec
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record


class AttentionMethod(LayerMethod):
  """The base class of attention methods: `(tokens, queries, keys, mode)` to `[B, L, H, K]`.

  `tokens` are the layer's normalised inputs, which a gate can use. `keys` holds the keys and values of
  this call, or all cached ones.
  """

  spec: Spec

  @property
  def layer(self) -> 'Callable[..., AttentionLayer]':
    """Constructor of the layer around the method, called as `layer(spec, method, name=...)`.

    It is read from an unbound module. A method with other projections or another cache overrides it.
    """
    reach, context = self.traits.reach, self.spec.context
    cache_size = context if reach is None else min(reach, context)
    return functools.partial(AttentionLayer, cache_size=cache_size)


class MaskedAttention(AttentionMethod):
  """Softmax attention to the keys that a mask allows, optionally narrowed by the scores."""

  @property
  def mask(self) -> Mask:
    """The keys that a query may read, whatever their scores."""
    return Mask()

  @property
  def max_keys(self) -> int | None:
    """Largest number of keys whose values a query reads once all scores are known; `None` means all."""
    return None

  @property
  def select(self) -> Select | None:
    """A function that narrows the mask to `max_keys` keys by their scores; `None` means no narrowing."""
    return None

  def __call__(self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str) -> jax.Array:
    """Attends from queries `[B, L, H, K]`; several query heads may share a key head."""
    return self.attend(tokens, q_BxLxHxK, keys, mode, self.mask)

  @nn.compact
  def attend(
    self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str, mask: Mask
  ) -> jax.Array:
    """Does the same as `__call__` with a given mask, which may depend on the queries."""
    dropout = Dropout(self.spec.dropout, deterministic=mode != 'train')
    dropped = dropout.rate > 0 and not dropout.deterministic
    acts = [act for act in (dropout if dropped else None, record.hook(self, 'weights')) if act]
    q_BxLxHxK = charge_attention(q_BxLxHxK, self.path, keys.k.shape[1], mask, self.max_keys)
    return attention(
      charge_cache_reads(q_BxLxHxK, self.path, keys, self.max_keys),
      tokens.positions,
      keys,
      mask,
      (lambda weights: functools.reduce(lambda w, act: act(w), acts, weights)) if acts else None,
      self.select,
      self.max_keys,
      self.spec.attention_kernel,
    )


class AttentionLayer(nn.Module):
  """The usual attention layer: projections, cache and output projection around an attention method.

  Attributes:
    method: constructor of the attention slot's module.
    cache_size: number of keys that decoding caches: the most keys that a query reads, up to and including
      its own.
    block: number of keys in a block whose mean decoding also caches; `None` means no blocks.
  """

  spec: Spec
  method: Callable[[], AttentionMethod]
  cache_size: int
  block: int | None = None

  @nn.compact
  def __call__(self, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the attention output of the tokens, `[B, L, D]`."""
    method = self.method()
    gating = method.traits.gating
    chosen = gating is not None
    # A norm of all heads together depends on the number of heads, so none can be removed.
    fixed = chosen or self.spec.query_key_norm == OF_ALL
    record.units(self.path, 'head', self.spec.kv_heads, self.head_axes, dynamic=fixed)
    q_BxLxHxK, keys = self.project(tokens, mode)
    out_BxLxHxK = method(tokens, q_BxLxHxK, keys, mode)
    with record.gated(method.path, gating):
      return self.merge(out_BxLxHxK)

  @property
  def head_axes(self) -> dict[str, int]:
    """The axis of each kernel along which the heads are laid out.

    A key head is pruned together with all query heads that share it.
    """
    return {'query/kernel': -1, 'key/kernel': -1, 'value/kernel': -1, 'out/kernel': -2}

  def project(self, tokens: Tokens, mode: str) -> tuple[jax.Array, KeyValues]:
    """Returns the tokens' queries `[B, L, H, K]`, and the keys of this call or all cached keys."""
    spec, (b, l, _) = self.spec, tokens.x.shape
    wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    features = {'query': wide, 'key': narrow, 'value': narrow}
    q_BxLxF, k_BxLxF, v_BxLxF = fused_projections(self, spec, tokens.x, features)
    q_BxLxF, k_BxLxF = self._normed(OF_ALL, q_BxLxF, k_BxLxF)
    # Packing may have removed some heads.
    q_BxLxHxK, k_BxLxGxK, v_BxLxGxK = (
      y.reshape(b, l, -1, spec.head_dim) for y in (q_BxLxF, k_BxLxF, v_BxLxF)
    )
    q_BxLxHxK, k_BxLxGxK = self._normed(OF_HEAD, q_BxLxHxK, k_BxLxGxK)
    if spec.positions == 'rotary':
      # Whole sequences share one table of angles.
      places = jnp.arange(l, dtype=jnp.int32)[None] if tokens.whole else tokens.positions
      q_BxLxHxK, k_BxLxGxK = (rotate(spec, a, places) for a in (q_BxLxHxK, k_BxLxGxK))
    q_BxLxHxK = record.site(self, 'q', q_BxLxHxK)
    k_BxLxGxK, v_BxLxGxK = record.site(self, 'k', k_BxLxGxK), record.site(self, 'v', v_BxLxGxK)
    if self.caches(mode):
      keep = functools.partial(cache.extend, self, self.cache_size, tokens, block=self.block)
      return q_BxLxHxK, keep(k_BxLxGxK, v_BxLxGxK)
    return q_BxLxHxK, KeyValues(k_BxLxGxK, v_BxLxGxK, tokens.positions, tokens.valid, tokens.whole)

  def _normed(self, what: str, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns queries and keys, normalised if `spec.query_key_norm` is `what`."""
    if self.spec.query_key_norm != what:
      return q, k
    query_norm, key_norm = (
      Norm(self.spec, RMSNORM, name=f'{name}_norm') for name in ('query', 'key')
    )
    return query_norm(q), key_norm(k)

  def merge(self, out_BxLxHxK: jax.Array) -> jax.Array:
    """Projects the heads' outputs `[B, L, H, K]` to `[B, L, D]`."""
    out_BxLxF = out_BxLxHxK.reshape(*out_BxLxHxK.shape[:2], -1)
    return Linear(self.spec, self.spec.width, role='out', name='out')(out_BxLxF)

  def caches(self, mode: str) -> bool:
    """Returns whether this call decodes with a cache."""
    return mode == 'decode' and self.is_mutable_collection('cache')


def charge_attention(
  q_BxLxHxK: jax.Array, path: tuple[str, ...], keys: int, mask: Mask, max_keys: int | None = None
) -> jax.Array:
  """Returns the queries, marked with the FLOPs of both matmuls of `attention` over all pairs.

  Dense attention computes all scores before it masks them, so each query is charged with every key, later
  keys included. A method that reads fewer keys is charged with all pairs times the fraction of the causal
  pairs that it reads. `cost.causal_pairs` converts this charge to the pairs that are read; the ratio to
  dense attention is the same. FLOPs that the kernel executes beyond the charge are marked as uncharged.

  Args:
    q_BxLxHxK: the queries.
    path: path of the module that is charged.
    keys: number of keys, S.
    mask: keys that it excludes by distance are charged neither for scores nor for values.
    max_keys: largest number of keys whose values are charged per query.
  """
  queries, pair = q_BxLxHxK.shape[1], 2 * q_BxLxHxK.size
  places = range(
    keys - queries, keys
  )  # the last positions: all in training, the newest in decoding
  within = [mask.count(place, keys) for place in places]
  there = sum(Mask(causal=mask.causal).count(place, keys) for place in places)
  scored, causal = sum(within) / there, there / (queries * keys)
  read = sum(count if max_keys is None else min(count, max_keys) for count in within) / there
  q_BxLxHxK = record.matmul(q_BxLxHxK, path, 'scores', pair * keys * scored, causal=causal)
  q_BxLxHxK = record.matmul(q_BxLxHxK, path, 'values', pair * keys * read, causal=causal)
  computed, charged = computed_keys(queries, keys, max_keys), keys * (scored + read)
  return record.uncharged(q_BxLxHxK, 'keys that a query does not read', pair * (computed - charged))


def charge_cache_reads(
  q_BxLxHxK: jax.Array, path: tuple[str, ...], keys: KeyValues, max_keys: int | None = None
) -> jax.Array:
  """Returns the queries, marked with the bytes that `attention` reads from a cache.

  If `keys` are not cached, nothing is marked.

  Args:
    q_BxLxHxK: the queries.
    path: path of the module whose cache is read.
    keys: the keys and values.
    max_keys: as in `attention`: each head of a single query reads at most this many values.
  """
  if not keys.cached:
    return q_BxLxHxK
  queries, held = q_BxLxHxK.shape[1], keys.k.shape[1]
  part = queries == 1 and max_keys is not None and max_keys < held
  values = q_BxLxHxK.size * max_keys * keys.v.dtype.itemsize if part else keys.v.nbytes
  q_BxLxHxK = record.read(q_BxLxHxK, path, 'keys', keys.k.nbytes)
  return record.read(q_BxLxHxK, path, 'values', values)
