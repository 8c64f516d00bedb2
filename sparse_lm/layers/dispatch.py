"""Dispatches tokens to experts and combines the experts' outputs.

Each (token, choice) pair is assigned a slot. Slots are grouped in blocks of equal size, and each block
belongs to one expert, so all experts run as one grouped matmul. The executor 'sort' moves rows by
index. The executor 'einsum' multiplies with one-hot matrices, as GShard does; it is the reference. When
only a few tokens are decoded, they need no slots: each choice is a block of one row.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.kernels.ranks import ranks, sizes
from sparse_lm.kernels.rows import take_rows
from sparse_lm.plan import record

Array = jax.Array

EXECUTORS = ('sort', 'einsum')


class SlotPlan(NamedTuple):
  """The assignment of (token, choice) pairs to slots: T tokens, J choices per token, S slots.

  Attributes:
    slot_TxJ: int32, the slot of each choice; S for a dropped choice.
    pair_S: int32, the pair `token * J + choice` in each slot; T * J for an empty slot.
    expert_N: int32, the expert of each block of S / N slots, ascending; E for unused blocks at the end.
      `None` means E blocks, and block i belongs to expert i.
    load_E: int32, number of pairs that chose each expert, dropped pairs included.
  """

  slot_TxJ: Array
  pair_S: Array
  expert_N: Array | None
  load_E: Array

  @property
  def blocks(self) -> int:
    """Number of blocks, N."""
    return self.load_E.size if self.expert_N is None else self.expert_N.size

  @property
  def served_TxJ(self) -> Array:
    """Whether each choice has a slot, bool."""
    return self.slot_TxJ < self.pair_S.size

  @property
  def dropped(self) -> Array:
    """Fraction of the pairs that chose an expert but have no slot, float32."""
    asked = jnp.sum(self.load_E)
    return (asked - jnp.sum(self.served_TxJ)) / jnp.maximum(asked, 1)


def assign_slots(expert_TxJ: Array, experts: int, capacity: int | None, block: int) -> SlotPlan:
  """Assigns slots to pairs in order of their tokens, then of the token's choices.

  Args:
    expert_TxJ: int32, the expert of each choice; the value `experts` means no expert.
    experts: number of experts, E.
    capacity: number of slots per expert; further pairs are dropped. `None` means that no pair is dropped.
    block: number of slots in a block, if `capacity` is `None`. Each expert then gets as many blocks as
      it needs, with at most `block - 1` empty slots. With a capacity, each expert has one block of that
      size.
  """
  tokens, choices = expert_TxJ.shape
  pairs = tokens * choices
  flat_P = expert_TxJ.reshape(-1)
  place_P, load_E = ranks(flat_P, experts)
  one_of = jnp.minimum(flat_P, experts - 1)
  served_P = flat_P < experts
  if capacity is not None:
    slots, expert_N = experts * capacity, None
    start_E = jnp.arange(experts) * capacity
    served_P &= place_P < capacity
  else:
    last_E = jnp.cumsum(-(-load_E // block))
    blocks = -(-pairs // block) + experts
    slots = blocks * block
    start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), last_E[:-1]]) * block
    # Blocks after the last used one belong to no expert.
    expert_N = jnp.sum(last_E <= jnp.arange(blocks)[:, None], axis=1, dtype=jnp.int32)
  slot_P = jnp.where(served_P, start_E[one_of] + place_P, slots).astype(jnp.int32)
  pair_S = jnp.full(slots, pairs, jnp.int32)
  pair_S = pair_S.at[slot_P].set(jnp.arange(pairs, dtype=jnp.int32), mode='drop')
  return SlotPlan(slot_P.reshape(tokens, choices), pair_S, expert_N, load_E)


def expert_load(expert_TxJ: Array, experts: int) -> Array:
  """Returns the number of choices of each expert, int32 `[E]`; the value `experts` means no expert."""
  return sizes(expert_TxJ.reshape(-1), experts)


def dispatch(x_TxD: Array, plan: SlotPlan, executor: str) -> Array:
  """Copies token rows to their slots, `[N, S / N, D]`; empty slots are zero."""
  tokens, choices = plan.slot_TxJ.shape
  if executor == 'einsum':
    one_hot_TxJxS = _one_hot(plan, x_TxD.dtype)
    x_SxD = jnp.einsum('ts,td->sd', jnp.sum(one_hot_TxJxS, axis=1), x_TxD)
    x_SxD = record.uncharged(x_SxD, 'tokens moved by one-hot matrices', 2 * tokens * x_SxD.size)
  else:
    token_S = jnp.where(plan.pair_S < tokens * choices, plan.pair_S // choices, tokens)
    x_SxD = take_rows(x_TxD, token_S, plan.slot_TxJ)
  return x_SxD.reshape(plan.blocks, -1, x_TxD.shape[1])


def combine(y_NxPxD: Array, plan: SlotPlan, weight_TxJ: Array, executor: str) -> Array:
  """Returns the weighted sum of each token's expert outputs, `[T, D]`; dropped pairs contribute zero."""
  y_SxD = y_NxPxD.reshape(-1, y_NxPxD.shape[-1])
  weight_TxJ = weight_TxJ.astype(y_SxD.dtype)
  if executor == 'einsum':
    weight_TxS = weighted_sum(_one_hot(plan, y_SxD.dtype), weight_TxJ)
    y_TxD = weight_TxS @ y_SxD
    flops = 2 * weight_TxS.size * y_SxD.shape[1]
    return record.uncharged(y_TxD, 'tokens moved by one-hot matrices', flops)
  rows = take_rows(y_SxD, plan.slot_TxJ.reshape(-1), plan.pair_S[:, None])
  return weighted_sum(rows.reshape(*weight_TxJ.shape, -1), weight_TxJ)


def run_choices(
  run: Callable[[Array, Array], Array], x_TxD: Array, expert_TxJ: Array, weight_TxJ: Array
) -> Array:
  """Runs each choice as a block of one row; returns the weighted sum of each token's outputs, `[T, D]`.

  Args:
    run: `(x_NxPxD, expert_N)` to `[N, P, D]`; zeros for blocks without an expert.
    x_TxD: the tokens.
    expert_TxJ: int32, as in `assign_slots`.
    weight_TxJ: weight of each choice.
  """
  tokens, choices = expert_TxJ.shape
  y_NxPxD = run(jnp.repeat(x_TxD, choices, axis=0)[:, None], expert_TxJ.reshape(-1))
  y_TxJxD = y_NxPxD.reshape(tokens, choices, -1)
  return weighted_sum(y_TxJxD, weight_TxJ.astype(x_TxD.dtype))


def weighted_sum(y_TxJxD: Array, weight_TxJ: Array) -> Array:
  """Returns the weighted sum of the outputs of each token's choices, `[T, D]`."""
  y_TxD = jnp.einsum('tjd,tj->td', y_TxJxD, weight_TxJ)
  return record.uncharged(y_TxD, "weighted sum of a token's experts", 2 * y_TxJxD.size)


def _one_hot(plan: SlotPlan, dtype: jnp.dtype) -> Array:
  """Returns one-hot slots `[T, J, S]`; all zero for dropped pairs."""
  return jax.nn.one_hot(plan.slot_TxJ, plan.pair_S.size, dtype=dtype)
