"""What queries read: keys and values, with what has to be known of each."""

import jax
from flax import struct


@struct.dataclass
class KeyValues:
  """Keys and values of a batch of sequences: those of its tokens, or all that a cache holds.

  Attributes:
    k: `[B, S, G, K]`; queries may have several heads for each of these.
    v: `[B, S, G, K]`.
    positions: int32 `[B, S]`, the place of each key's token in its sequence, in any order.
    valid: bool `[B, S]`, whether the key may be read.
  """

  k: jax.Array
  v: jax.Array
  positions: jax.Array
  valid: jax.Array
