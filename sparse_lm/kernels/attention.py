"""Softmax attention to the keys that a mask describes: one function, the backend chosen inside."""

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
KERNELS = ('auto', EINSUM, CUDNN)  # what `config.model.attention_kernel` may be
WIDEST = 128  # head that cuDNN's fused attention takes, on every GPU that has it
# `(scores, mask) -> mask`, all `[B, G, H / G, L, S]`; the scores are float32.
Select = Callable[[Array, Array], Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('k', 'v', 'positions', 'valid', 'means'),
  meta_fields=('whole', 'cached'),
)
@dataclasses.dataclass(frozen=True)
class KeyValues(Placed):
  """Keys and values of a batch of sequences: those of its tokens, or all cached ones.

  Attributes:
    k: `[B, S, G, K]`; queries may have several heads for each of these.
    v: `[B, S, G, K]`.
    positions: int32 `[B, S]`, the place of each key's token in its sequence, in any order.
    valid: bool `[B, S]`, whether the key may be read.
    whole: whether all keys of each sequence are known to be there, in order; see `kernels/placed.py`.
    means: float32 `[B, N, G, K]`, the mean of each block of keys, where a cache keeps them; see `blocks`.
    cached: whether these are a cache's, so that what is read of them is counted.
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
  """Blocks of keys, of which each query of each head reads some.

  Attributes:
    read: bool `[B, G, H / G, L, N]`, whether a query reads the block; G and H / G may be 1, which stands
      for all heads, or for all that share a key head.
    size: keys of a block.
    most: blocks that `read` holds for a query at most, its own among them; `None` = all. No kernel needs
      to know: costs are counted by it, see `Mask.count`.
    of_keys: int32 `[B, S]`, the block that each key is in; `None` = one at position p is in `p // size`.
  """

  read: Array
  size: int = struct.field(pytree_node=False)
  most: int | None = struct.field(pytree_node=False, default=None)
  of_keys: Array | None = None


@struct.dataclass
class Documents:
  """Which document each token belongs to, where a sequence has several: none reads another.

  Attributes:
    of_queries: int32 `[B, L]`.
    of_keys: int32 `[B, S]`.
  """

  of_queries: Array
  of_keys: Array


@struct.dataclass
class Mask:
  """Which keys a query may read; described, so that a kernel can leave out what it need not compute.

  A valid key is read where all of these allow it.

  Attributes:
    causal: keys at the query's position or before it, and no later ones.
    window: keys less than so many positions from the query; `None` = of any distance.
    sinks: so many positions at the beginning of a sequence are read from any distance.
    blocks: the blocks of keys that each query reads.
    documents: keys of the query's own document alone.
  """

  causal: bool = struct.field(pytree_node=False, default=True)
  window: int | None = struct.field(pytree_node=False, default=None)
  sinks: int = struct.field(pytree_node=False, default=0)
  blocks: Blocks | None = None
  documents: Documents | None = None

  def count(self, query: int, keys: int) -> int:
    """How many keys the query at a position reads at most, of valid ones at 0 to `keys` - 1.

    What is known before a model runs counts: distance, sinks, and how many blocks are read at most. Of
    the query's own block those keys count that it may read; each other block counts as full, though a
    window or the end of the keys may cut it. Only a running model knows documents, which count as if
    there were one, and what a method selects by scores, which is the `most` of `attention`.
    """
    first, last = 0, query if self.causal else keys - 1
    if self.window is not None:
      first, last = max(0, query - self.window + 1), min(last, query + self.window - 1)
    near, sinks = last - first + 1, min(self.sinks, first)
    if self.blocks is None or self.blocks.most is None:
      return near + sinks
    size = self.blocks.size
    start = query // size * size
    own = min(last, start + size - 1) - max(first, start) + 1 + max(0, sinks - start)
    return min(near + sinks, own + (self.blocks.most - 1) * size)


def attention(
  q_BxLxHxK: Array,
  positions_BxL: Array,
  keys: KeyValues,
  mask: Mask,
  on_weights: Callable[[Array], Array] | None = None,
  select: Select | None = None,
  most: int | None = None,
  kernel: str = EINSUM,
) -> Array:
  """Softmax attention, grouped-query where keys have fewer heads: `[B, L, H, K]`.

  There are two kernels. Einsums over `[B, H, L, K]` run on every device and support every call; they
  store scores and weights as arrays `[B, H, L, S]`. (On a CPU they are faster than the default
  implementation of `jax.nn.dot_product_attention`, which is not fused on a GPU either.) cuDNN's fused
  kernel stores neither scores nor weights, and runs the calls for which `unfused` finds no reason against
  it. A query that may read no key gives all keys the same weight.

  Args:
    positions_BxL: int32, of the queries.
    on_weights: what is done to the attention weights, `[B, G, H / G, L, S]`, such as dropout; `None` =
      nothing.
    select: narrows the mask by the scores.
    most: keys that `select` leaves at most; a single query reads the values of no others.
    kernel: one of `KERNELS`. With any but 'einsum' the fused kernel runs where device and call allow it,
      and einsums elsewhere: whether 'cudnn' may be asked for is checked before a run starts.
  """
  reason = unfused(q_BxLxHxK, positions_BxL, keys, mask, on_weights, select)
  seen = _calls.get()
  if seen is not None:
    seen.append(reason)
  if not reason and kernel != EINSUM and device.has_fused_attention():
    return _fused(q_BxLxHxK, keys, mask, 'cudnn')
  reads = reads_of(mask, positions_BxL, keys)
  b, l, h, width = q_BxLxHxK.shape
  g = keys.k.shape[2]
  q_BxGxRxLxK = q_BxLxHxK.reshape(b, l, g, h // g, width).transpose(0, 2, 3, 1, 4) * width**-0.5
  k_BxGxSxK, v_BxGxSxK = (a.transpose(0, 2, 1, 3) for a in (keys.k, keys.v))

  def weights_of(scores: Array) -> Array:
    weights = softmax(scores, reads, select)
    return weights if on_weights is None else on_weights(weights)

  if l == 1 or l < keys.k.shape[1]:  # keys that a cache holds
    out_BxGxRxLxK = _attend_cached(q_BxGxRxLxK, k_BxGxSxK, v_BxGxSxK, weights_of, most)
  else:
    weights = weights_of(jnp.einsum('bgrlk,bgsk->bgrls', q_BxGxRxLxK, k_BxGxSxK))
    out_BxGxRxLxK = jnp.einsum('bgrls,bgsk->bgrlk', weights, v_BxGxSxK)
  return out_BxGxRxLxK.transpose(0, 3, 1, 2, 4).reshape(b, l, h, -1)


_calls: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar('calls', default=None)


@contextlib.contextmanager
def calls() -> Iterator[list[str]]:
  """Collects what `unfused` says of every call of `attention` that is traced inside."""
  found: list[str] = []
  token = _calls.set(found)
  try:
    yield found
  finally:
    _calls.reset(token)


def unfused(
  q_BxLxHxK: Array,
  positions_BxL: Array,
  keys: KeyValues,
  mask: Mask,
  on_weights: Callable[[Array], Array] | None = None,
  select: Select | None = None,
) -> str:
  """Why cuDNN's fused kernel cannot run a call of `attention` on any device; '' where it can.

  The kernel masks by causality and by a window, both counted in indices of the arrays. Indices are
  positions where sequences are whole and queries and keys are of the same tokens, which share one array
  of positions. JAX compiles the seed of the kernel's dropout into the program as a constant, so every
  step would drop the same weights; therefore the kernel's dropout is not used.
  """
  width, dtype = q_BxLxHxK.shape[-1], q_BxLxHxK.dtype
  if select is not None:
    return 'the method selects keys by their scores'
  if on_weights is not None:
    return (
      'something acts on the attention weights (config.model.dropout, or a method at their site)'
    )
  if mask.blocks is not None or mask.documents is not None or mask.sinks or not mask.causal:
    return 'it takes causal and sliding-window masks alone, and the method has another mask'
  if not keys.whole or positions_BxL is not keys.positions:
    return 'it reads whole sequences, and here tokens are left out or keys are cached'
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f'it computes in bfloat16, and config.model.precision is {dtype}'
  if width % 8 or width > WIDEST or keys.v.shape[-1] != width:
    return f'it takes heads 8, 16, 24, ... {WIDEST} wide, and these are {width}'
  if q_BxLxHxK.shape[1] % 2:  # JAX refuses the gradient
    return f'it trains on an even number of tokens, and config.data.context is {q_BxLxHxK.shape[1]}'
  return ''


def _fused(q_BxLxHxK: Array, keys: KeyValues, mask: Mask, implementation: str) -> Array:
  """`jax.nn.dot_product_attention` with a causal mask and a window: `[B, L, H, K]`.

  `is_causal` is given beside the window, because cuDNN's window alone reads later keys (jax issue 39576).

  Args:
    implementation: 'cudnn', or 'xla', which computes the same from the same arguments.
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


def computed_keys(queries: int, keys: int, most: int | None = None) -> int:
  """How many keys and how many values, together, `attention` multiplies for each query."""
  gathered = keys if most is None or queries > 1 else min(most, keys)
  return keys + gathered


def reads_of(mask: Mask, positions_BxL: Array, keys: KeyValues) -> Array:
  """The mask as bools that broadcast to `[B, G, H / G, L, S]`: the reference of what it means.

  A query that no such key is left for (a token that skips the layer) reads its own: its output is
  dropped, but the gradient of the gate that dropped it must not come from later tokens.
  """
  places_BxS, whole = keys.positions, keys.whole and positions_BxL is keys.positions
  if whole:  # then these are bools of one sequence, `[1, L, S]`, which stand for all
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
  """Softmax over the keys that are read, and that `select` leaves; in float32, given as scores were."""
  reads = reads if select is None else select(scores.astype(jnp.float32), reads)
  return (_softmax if scores.dtype == jnp.float32 else _rounded_softmax)(scores, reads)


def _softmax(scores: Array, reads: Array) -> Array:
  return jax.nn.softmax(
    jnp.where(reads, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
  ).astype(scores.dtype)


@jax.custom_vjp
def _rounded_softmax(scores: Array, reads: Array) -> Array:
  """`_softmax` of bfloat16 scores; the backward pass keeps the weights in bfloat16 alone.

  JAX's own gradient would keep them in float32 as well, which takes more memory traffic.
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
  most: int | None,
) -> Array:
  """`[B, G, R, L, K]` of one query of each sequence, or of a few that go on behind what a cache holds.

  In three dimensions, keys in rows of features: XLA:CPU runs the general form of a single query ten
  times slower. A cache keeps keys and values in that layout (`kernels/cache.py`), so the transposes cost
  nothing.
  """
  b, g, r, l, width = q_BxGxRxLxK.shape
  q_NxRxK = q_BxGxRxLxK.reshape(b * g, r * l, width)
  k_NxKxS = k_BxGxSxK.swapaxes(2, 3).reshape(b * g, width, -1)
  v_NxSxK = v_BxGxSxK.reshape(b * g, *v_BxGxSxK.shape[2:])
  scores_NxRxS = jnp.einsum('nrk,nks->nrs', q_NxRxK, k_NxKxS)
  weights_NxRxS = weights_of(scores_NxRxS.reshape(b, g, r, l, -1)).reshape(b * g, r * l, -1)
  if l > 1 or most is None or most >= weights_NxRxS.shape[-1]:
    out_NxRxK = jnp.einsum('nrs,nsk->nrk', weights_NxRxS, v_NxSxK)
  else:
    weights_NxRxS, index_NxRxS = top(weights_NxRxS, most)
    v_NxRxSxK = jnp.take_along_axis(v_NxSxK[:, None], index_NxRxS[..., None], axis=2)
    out_NxRxK = jnp.einsum('nrs,nrsk->nrk', weights_NxRxS, v_NxRxSxK)
  return out_NxRxK.reshape(b, g, r, l, -1)
