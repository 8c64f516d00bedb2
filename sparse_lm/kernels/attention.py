"""Softmax attention with masks. `attention` chooses the backend (einsum or cuDNN) itself."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import struct

from sparse_lm.kernels import device
from sparse_lm.kernels.placed import Placed
from sparse_lm.kernels.topk import top

Array = jax.Array
EINSUM, CUDNN = 'einsum', 'cudnn'
KERNELS = ('auto', EINSUM, CUDNN)  # the values of `config.model.attention_kernel`
MAX_FUSED_HEAD = 128  # largest head width that cuDNN's fused attention supports on all its GPUs
# `(scores, mask) -> mask`, all `[B, G, H / G, L, S]`; the scores are float32.
Select = Callable[[Array, Array], Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('k', 'v', 'positions', 'valid', 'means'),
  meta_fields=('whole', 'cached'),
)
@dataclasses.dataclass(frozen=True)
class KeyValues(Placed):
  """Keys and values of a batch of sequences: those of the current tokens, or all cached ones.

  Attributes:
    k: `[B, S, G, K]`; several query heads may share one of the G heads.
    v: `[B, S, G, K]`.
    positions: int32 `[B, S]`, the position of each key's token in its sequence, in any order.
    valid: bool `[B, S]`, whether the key may be read.
    whole: whether all keys of each sequence are known to be present, in order (`kernels/placed.py`).
    means: float32 `[B, N, G, K]`, the mean of each block of keys, if the cache keeps it (`blocks.py`).
    cached: whether keys and values come from a cache; the bytes read from a cache are counted.
  """

  k: Array
  v: Array
  positions: Array
  valid: Array
  whole: bool = False
  means: Array | None = None
  cached: bool = False


@struct.dataclass
class Blocks:
  """The blocks of keys that each query reads.

  Attributes:
    read: bool `[B, G, H / G, L, N]`, whether a query reads each block. G may be 1 if all heads read the
      same blocks, and H / G may be 1 if the heads that share a key head do.
    size: number of keys in a block.
    max_blocks: the most blocks that a query reads, its own included; `None` means all. Used only to count
      costs (`Mask.count`).
    of_keys: int32 `[B, S]`, the block of each key; `None` means that position p is in block `p // size`.
  """

  read: Array
  size: int = struct.field(pytree_node=False)
  max_blocks: int | None = struct.field(pytree_node=False, default=None)
  of_keys: Array | None = None


@struct.dataclass
class Documents:
  """The document of each token in sequences of several documents; a token reads only its own document.

  Attributes:
    of_queries: int32 `[B, L]`, the document of each query.
    of_keys: int32 `[B, S]`, the document of each key.
  """

  of_queries: Array
  of_keys: Array


@struct.dataclass
class Mask:
  """A description of the keys that each query may read, from which kernels can skip computation.

  A query reads a valid key if all of the following allow it.

  Attributes:
    causal: whether a query reads only keys up to its own position.
    window: a query reads only keys at a distance below this number of positions; `None` means any
      distance.
    sinks: number of positions at the start of a sequence that are read from any distance.
    blocks: the blocks of keys that each query reads; `None` means all.
    documents: if given, a query reads only keys of its own document.
  """

  causal: bool = struct.field(pytree_node=False, default=True)
  window: int | None = struct.field(pytree_node=False, default=None)
  sinks: int = struct.field(pytree_node=False, default=0)
  blocks: Blocks | None = None
  documents: Documents | None = None

  def count(self, query: int, keys: int) -> int:
    """Returns the most keys that a query reads, given valid keys at positions 0 to `keys` - 1.

    The count uses only what is known before the model runs: distances, sinks and the largest number of
    blocks. Of the query's own block, only readable keys count; every other block counts as full.
    Documents are ignored, and so is a selection by scores (`max_keys` of `attention`).

    Args:
      query: position of the query.
      keys: number of keys.
    """
    first, last = 0, query if self.causal else keys - 1
    if self.window is not None:
      first, last = max(0, query - self.window + 1), min(last, query + self.window - 1)
    near, sinks = last - first + 1, min(self.sinks, first)
    if self.blocks is None or self.blocks.max_blocks is None:
      return near + sinks
    size = self.blocks.size
    start = query // size * size
    own = min(last, start + size - 1) - max(first, start) + 1 + max(0, sinks - start)
    return min(near + sinks, own + (self.blocks.max_blocks - 1) * size)


def attention(
  q_BxLxHxK: Array,
  positions_BxL: Array,
  keys: KeyValues,
  mask: Mask,
  on_weights: Callable[[Array], Array] | None = None,
  select: Select | None = None,
  max_keys: int | None = None,
  kernel: str = EINSUM,
) -> Array:
  """Softmax attention, with grouped queries if keys have fewer heads; returns `[B, L, H, K]`.

  There are two backends. Einsums over `[B, H, L, K]` run on every device and support every call, but
  store scores and weights as arrays `[B, H, L, S]`. (On a CPU they are faster than the default
  implementation of `jax.nn.dot_product_attention`, which is not fused on a GPU either.) cuDNN's fused
  kernel stores neither scores nor weights. It supports the calls for which `why_unfused` returns ''. A
  query that may read no key gives all keys the same weight.

  Args:
    q_BxLxHxK: queries.
    positions_BxL: int32, positions of the queries.
    keys: keys and values.
    mask: the keys that each query may read.
    on_weights: a function of the attention weights `[B, G, H / G, L, S]`, such as dropout; `None` means
      none.
    select: a function that narrows the mask by the scores; `None` means none.
    max_keys: the most keys that `select` keeps; a single query reads only their values.
    kernel: one of `KERNELS`. Unless it is 'einsum', the fused kernel runs if the device and the call
      support it, and einsums run otherwise. A run that asks for 'cudnn' is checked before it starts.
  """
  reason = why_unfused(q_BxLxHxK, positions_BxL, keys, mask, on_weights, select)
  seen = _refusals.get()
  if seen is not None:
    seen.append(reason)
  if not reason and kernel != EINSUM and device.has_fused_attention():
    return _fused(q_BxLxHxK, keys, mask, 'cudnn')
  reads = mask_array(mask, positions_BxL, keys)
  b, l, h, width = q_BxLxHxK.shape
  g = keys.k.shape[2]
  q_BxGxRxLxK = q_BxLxHxK.reshape(b, l, g, h // g, width).transpose(0, 2, 3, 1, 4) * width**-0.5
  k_BxGxSxK, v_BxGxSxK = (a.transpose(0, 2, 1, 3) for a in (keys.k, keys.v))

  def weights_of(scores: Array) -> Array:
    weights = softmax(scores, reads, select)
    return weights if on_weights is None else on_weights(weights)

  if l == 1 or l < keys.k.shape[1]:  # the keys come from a cache
    out_BxGxRxLxK = _attend_cached(q_BxGxRxLxK, k_BxGxSxK, v_BxGxSxK, weights_of, max_keys)
  else:
    weights = weights_of(jnp.einsum('bgrlk,bgsk->bgrls', q_BxGxRxLxK, k_BxGxSxK))
    out_BxGxRxLxK = jnp.einsum('bgrls,bgsk->bgrlk', weights, v_BxGxSxK)
  return out_BxGxRxLxK.transpose(0, 3, 1, 2, 4).reshape(b, l, h, -1)


_refusals: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
  'refusals', default=None
)


@contextlib.contextmanager
def collect_fused_refusals() -> Iterator[list[str]]:
  """Collects the result of `why_unfused` for each call of `attention` that is traced in the context."""
  found: list[str] = []
  token = _refusals.set(found)
  try:
    yield found
  finally:
    _refusals.reset(token)


def why_unfused(
  q_BxLxHxK: Array,
  positions_BxL: Array,
  keys: KeyValues,
  mask: Mask,
  on_weights: Callable[[Array], Array] | None = None,
  select: Select | None = None,
) -> str:
  """Returns the reason why cuDNN's fused kernel cannot run a call of `attention`; '' if it can.

  The device is not considered. The kernel supports causal masks and windows, measured in array indices.
  These are positions only if the sequences are whole and the queries and keys belong to the same
  tokens, and so share one array of positions. The kernel's own dropout is not used: JAX compiles its
  seed into the program, so every step would drop the same weights.
  """
  width, dtype = q_BxLxHxK.shape[-1], q_BxLxHxK.dtype
  if select is not None:
    return 'the method selects keys by their scores'
  if on_weights is not None:
    return (
      'something acts on the attention weights (config.model.dropout, or a method at their site)'
    )
  if mask.blocks is not None or mask.documents is not None or mask.sinks or not mask.causal:
    return 'it supports only causal and sliding-window masks, and the method has another mask'
  if not keys.whole or positions_BxL is not keys.positions:
    return 'it needs whole sequences, but here tokens are left out or keys are cached'
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f'it computes in bfloat16, but config.model.precision is {dtype}'
  if width % 8 or width > MAX_FUSED_HEAD or keys.v.shape[-1] != width:
    return (
      f'it supports heads of width 8, 16, 24, ... {MAX_FUSED_HEAD}, but these have width {width}'
    )
  if q_BxLxHxK.shape[1] % 2:  # JAX refuses the gradient
    return f'it trains on an even number of tokens, but config.data.context is {q_BxLxHxK.shape[1]}'
  return ''


def _fused(q_BxLxHxK: Array, keys: KeyValues, mask: Mask, implementation: str) -> Array:
  """Calls `jax.nn.dot_product_attention` with a causal mask and a window; returns `[B, L, H, K]`.

  `is_causal` is needed in addition to the window, because cuDNN's window alone reads later keys (jax
  issue 39576).

  Args:
    q_BxLxHxK: queries.
    keys: keys and values.
    mask: the mask, of which only the window is used.
    implementation: 'cudnn', or 'xla' for the same result on any device.
  """
  window = None
  if mask.window is not None and mask.window < keys.k.shape[1]:
    window = mask.window - 1, 0
  return jax.nn.dot_product_attention(
    q_BxLxHxK,
    keys.k,
    keys.v,
    is_causal=True,
    local_window_size=window,
    implementation=implementation,
  )


def computed_keys(queries: int, keys: int, max_keys: int | None = None) -> int:
  """Returns the number of keys plus the number of values that `attention` multiplies per query."""
  gathered = keys if max_keys is None or queries > 1 else min(max_keys, keys)
  return keys + gathered


def mask_array(mask: Mask, positions_BxL: Array, keys: KeyValues) -> Array:
  """Returns the mask as bools that broadcast to `[B, G, H / G, L, S]`; this defines its meaning.

  A token that skips the layer has no readable key, so its query reads its own key. The layer's output for
  this token is multiplied by a gate of 0, but the gate's gradient depends on the output. The output must
  therefore not depend on later tokens.
  """
  places_BxS, whole = keys.positions, keys.whole and positions_BxL is keys.positions
  if whole:  # one mask `[1, L, S]` serves all sequences
    positions_BxL = places_BxS = jnp.arange(places_BxS.shape[1], dtype=jnp.int32)[None]
  age_BxLxS = positions_BxL[:, :, None] - places_BxS[:, None, :]
  reads_BxLxS = age_BxLxS >= 0 if mask.causal else jnp.ones_like(age_BxLxS, bool)
  if not whole:
    reads_BxLxS &= keys.valid[:, None, :]
  if mask.window is not None:
    near = (age_BxLxS if mask.causal else jnp.abs(age_BxLxS)) < mask.window
    reads_BxLxS &= near if not mask.sinks else near | (places_BxS[:, None, :] < mask.sinks)
  if whole and mask.blocks is None and mask.documents is None:
    return reads_BxLxS[:, None, None]  # each query reads its own key
  if mask.documents is not None:
    reads_BxLxS &= mask.documents.of_queries[:, :, None] == mask.documents.of_keys[:, None, :]
  if mask.blocks is None:
    return _or_own(reads_BxLxS, age_BxLxS)[:, None, None]
  given_BxS = mask.blocks.of_keys
  block_BxS = keys.positions // mask.blocks.size if given_BxS is None else given_BxS
  chosen = jnp.take_along_axis(mask.blocks.read, block_BxS[:, None, None, None], axis=-1)
  return _or_own(reads_BxLxS[:, None, None] & chosen, age_BxLxS[:, None, None])


def _or_own(reads: Array, age: Array) -> Array:
  return reads | ((age == 0) & ~jnp.any(reads, axis=-1, keepdims=True))


def softmax(scores: Array, reads: Array, select: Select | None = None) -> Array:
  """Softmax over the readable keys that `select` keeps; float32, then cast to the scores' dtype."""
  reads = reads if select is None else select(scores.astype(jnp.float32), reads)
  return (_softmax if scores.dtype == jnp.float32 else _rounded_softmax)(scores, reads)


def _softmax(scores: Array, reads: Array) -> Array:
  return jax.nn.softmax(
    jnp.where(reads, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
  ).astype(scores.dtype)


@jax.custom_vjp
def _rounded_softmax(scores: Array, reads: Array) -> Array:
  """`_softmax` of bfloat16 scores, which saves only bfloat16 weights for the backward pass.

  JAX's own gradient would also save them in float32, which costs memory traffic.
  """
  return _softmax(scores, reads)


def _keep_weights(scores: Array, reads: Array) -> tuple[Array, tuple[Array, Array]]:
  weights = _softmax(scores, reads)
  return weights, (weights, reads)


def _pull_back(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
  exact, reads = kept[0].astype(jnp.float32), kept[1]
  gradient = gradient.astype(jnp.float32)
  inner = jnp.sum(exact * gradient, axis=-1, keepdims=True)
  return jnp.where(reads, exact * (gradient - inner), 0).astype(kept[0].dtype), None


_rounded_softmax.defvjp(_keep_weights, _pull_back)


def _attend_cached(
  q_BxGxRxLxK: Array,
  k_BxGxSxK: Array,
  v_BxGxSxK: Array,
  weights_of: Callable[[Array], Array],
  max_keys: int | None,
) -> Array:
  """Attention of one or a few new queries per sequence to cached keys; returns `[B, G, R, L, K]`.

  The products have three dimensions, with keys as rows of features, because XLA:CPU runs the general
  form ten times slower for a single query. A cache uses this layout (`kernels/cache.py`), so the
  transposes are free.
  """
  b, g, r, l, width = q_BxGxRxLxK.shape
  q_NxRxK = q_BxGxRxLxK.reshape(b * g, r * l, width)
  k_NxKxS = k_BxGxSxK.swapaxes(2, 3).reshape(b * g, width, -1)
  v_NxSxK = v_BxGxSxK.reshape(b * g, *v_BxGxSxK.shape[2:])
  scores_NxRxS = jnp.einsum('nrk,nks->nrs', q_NxRxK, k_NxKxS)
  weights_NxRxS = weights_of(scores_NxRxS.reshape(b, g, r, l, -1)).reshape(b * g, r * l, -1)
  if l > 1 or max_keys is None or max_keys >= weights_NxRxS.shape[-1]:
    out_NxRxK = jnp.einsum('nrs,nsk->nrk', weights_NxRxS, v_NxSxK)
  else:
    weights_NxRxS, index_NxRxS = top(weights_NxRxS, max_keys)
    v_NxRxSxK = jnp.take_along_axis(v_NxSxK[:, None], index_NxRxS[..., None], axis=2)
    out_NxRxK = jnp.einsum('nrs,nrsk->nrk', weights_NxRxS, v_NxRxSxK)
  return out_NxRxK.reshape(b, g, r, l, -1)
