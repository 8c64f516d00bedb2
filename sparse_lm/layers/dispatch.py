"""Tokens to experts and back: one plan, and what runs it.

A plan gives (token, choice) pairs slots; slots come in blocks of equal size and a block belongs to
one expert, so that experts run as one grouped matmul. `sort` moves rows by index; `einsum` multiplies
by one-hot matrices, as GShard does, and is the reference. Few tokens take no slots: each of their choices
is a block of its own.
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


class Plan(NamedTuple):
  """Which pair has which slot: T tokens, J choices each, S slots.

  Attributes:
    slot_TxJ: int32, the slot of a choice, S where it was dropped.
    pair_S: int32, `token * J + choice` of the pair in a slot, T * J where it is empty.
    expert_N: int32, the expert of each block of S / N slots, ascending; E for the unused blocks at the
      end. `None` = E blocks, and block i belongs to expert i.
    load_E: int32, pairs that asked for each expert, dropped ones included.
  """

  slot_TxJ: Array
  pair_S: Array
  expert_N: Array | None
  load_E: Array

  @property
  def blocks(self) -> int:
    """The number of blocks, N."""
    return self.load_E.size if self.expert_N is None else self.expert_N.size

  @property
  def served_TxJ(self) -> Array:
    """Whether a choice got a slot, bool."""
    return self.slot_TxJ < self.pair_S.size

  @property
  def dropped(self) -> Array:
    """Fraction of the pairs that asked for an expert and got no slot, float32."""
    asked = jnp.sum(self.load_E)
    return (asked - jnp.sum(self.served_TxJ)) / jnp.maximum(asked, 1)


def plan(expert_TxJ: Array, experts: int, capacity: int | None, block: int) -> Plan:
  """Gives pairs slots in order: earlier tokens first, of one token the earlier choice.

  Args:
    expert_TxJ: int32, the expert of each choice; `experts` = none.
    experts: E.
    capacity: slots of each expert; further pairs are dropped. `None` = no pair is dropped.
    block: slots of a block where there is no capacity: every expert gets as many blocks as it needs,
      which leaves at most `block - 1` of its slots empty. With a capacity every expert has one block of
      that size.
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
    # Behind the last block with a pair in it they are no expert's.
    expert_N = jnp.sum(last_E <= jnp.arange(blocks)[:, None], axis=1, dtype=jnp.int32)
  slot_P = jnp.where(served_P, start_E[one_of] + place_P, slots).astype(jnp.int32)
  pair_S = jnp.full(slots, pairs, jnp.int32)
  pair_S = pair_S.at[slot_P].set(jnp.arange(pairs, dtype=jnp.int32), mode='drop')
  return Plan(slot_P.reshape(tokens, choices), pair_S, expert_N, load_E)


def load(expert_TxJ: Array, experts: int) -> Array:
  """How many choices ask for each expert, int32 `[E]`; `experts` = none."""
  return sizes(expert_TxJ.reshape(-1), experts)


def dispatch(x_TxD: Array, plan: Plan, executor: str) -> Array:
  """Token rows in their slots, zeros in empty ones: `[N, S / N, D]`."""
  tokens, choices = plan.slot_TxJ.shape
  if executor == 'einsum':
    one_hot_TxJxS = _one_hot(plan, x_TxD.dtype)
    x_SxD = jnp.einsum('ts,td->sd', jnp.sum(one_hot_TxJxS, axis=1), x_TxD)
    x_SxD = record.uncharged(x_SxD, 'tokens moved by one-hot matrices', 2 * tokens * x_SxD.size)
  else:
    token_S = jnp.where(plan.pair_S < tokens * choices, plan.pair_S // choices, tokens)
    x_SxD = take_rows(x_TxD, token_S, plan.slot_TxJ)
  return x_SxD.reshape(plan.blocks, -1, x_TxD.shape[1])


def combine(y_NxPxD: Array, plan: Plan, weight_TxJ: Array, executor: str) -> Array:
  """Each token's slots, weighted and summed: `[T, D]`; dropped pairs count as zero."""
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
  """Each token's choices, one block with one row for each, weighted and summed: `[T, D]`.

  Args:
    run: `(x_NxPxD, expert_N)` to `[N, P, D]`, zeros for the expert that stands for none.
    expert_TxJ: int32, see `plan`.
  """
  tokens, choices = expert_TxJ.shape
  y_NxPxD = run(jnp.repeat(x_TxD, choices, axis=0)[:, None], expert_TxJ.reshape(-1))
  y_TxJxD = y_NxPxD.reshape(tokens, choices, -1)
  return weighted_sum(y_TxJxD, weight_TxJ.astype(x_TxD.dtype))


def weighted_sum(y_TxJxD: Array, weight_TxJ: Array) -> Array:
  """What a token's choices give, weighted and summed: `[T, D]`."""
  y_TxD = jnp.einsum('tjd,tj->td', y_TxJxD, weight_TxJ)
  return record.uncharged(y_TxD, "weighted sum of a token's experts", 2 * y_TxJxD.size)


def _one_hot(plan: Plan, dtype: jnp.dtype) -> Array:
  """One-hot `[T, J, S]`; all zero where a pair was dropped."""
  return jax.nn.one_hot(plan.slot_TxJ, plan.pair_S.size, dtype=dtype)
