"""Slots, rows and gradients of experts, against loops over (token, choice) pairs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.layers.dispatch import EXECUTORS, SlotPlan, assign_slots, combine, dispatch

WIDTH = 3


class Case(NamedTuple):
  """Static sizes: each compiles once."""

  tokens: int
  choices: int
  experts: int
  capacity: int | None
  block: int = 64


LIMITED = [Case(9, 2, 3, 2), Case(9, 2, 3, 18), Case(1, 1, 1, 1), Case(7, 3, 4, 1)]
DROPLESS = [Case(9, 2, 3, None, block) for block in (1, 4, 64)] + [Case(7, 3, 4, None, 3)]


@functools.cache
def planned(case):
  run = jax.jit(
    lambda expert_TxJ: assign_slots(expert_TxJ, case.experts, case.capacity, case.block)
  )
  return lambda expert_TxJ: jax.device_get(run(expert_TxJ))


@st.composite
def routings(draw, cases):
  """A case and the experts that its tokens ask for; the number of experts stands for none."""
  case = draw(st.sampled_from(cases))
  size = case.tokens * case.choices
  # The upper end of what is drawn varies, so that some experts are crowded and others empty.
  highest = draw(st.integers(0, case.experts))
  expert = draw(st.lists(st.integers(0, highest), min_size=size, max_size=size))
  return case, np.array(expert, np.int32).reshape(case.tokens, case.choices)


def queues(case, expert_TxJ):
  """For each expert the (token, choice) pairs that get a seat, in order, and how many do not."""
  seated = [[] for _ in range(case.experts)]
  dropped = 0
  for t in range(case.tokens):
    for j in range(case.choices):
      e = expert_TxJ[t, j]
      if e == case.experts:
        continue
      if case.capacity is None or len(seated[e]) < case.capacity:
        seated[e].append((t, j))
      else:
        dropped += 1
  return seated, dropped


def pair_in_slot(got, choices):
  """By slot the (token, choice) that sits there, `None` where nobody does."""
  pairs = got.slot_TxJ.size
  return [divmod(int(p), choices) if p < pairs else None for p in got.pair_S]


@given(routings(LIMITED + DROPLESS))
@settings(deadline=None, max_examples=120)
def test_pairs_get_slots_in_order_of_token_then_choice(routing):
  case, expert = routing
  got = planned(case)(expert)
  seated, dropped = queues(case, expert)
  assert_array_equal(got.load_E, [(expert == e).sum() for e in range(case.experts)])
  asked = (expert < case.experts).sum()
  assert float(got.dropped) == pytest.approx(dropped / max(asked, 1))
  size = got.pair_S.size // got.blocks
  owner_N = np.arange(case.experts) if got.expert_N is None else got.expert_N
  rows = pair_in_slot(got, case.choices)
  for e, queue in enumerate(seated):
    of_expert = [row for s, row in enumerate(rows) if row and owner_N[s // size] == e]
    assert of_expert == queue
  # The two directions agree: a seated pair knows its slot, any other has the number of slots.
  slot_of = {row: s for s, row in enumerate(rows) if row}
  for pair, slot in np.ndenumerate(got.slot_TxJ):
    assert slot == slot_of.get(pair, got.pair_S.size)


@given(routings(LIMITED))
@settings(deadline=None, max_examples=60)
def test_with_a_capacity_block_e_is_expert_e_and_fills_from_its_start(routing):
  case, expert = routing
  got = planned(case)(expert)
  assert got.expert_N is None and got.blocks == case.experts
  rows = pair_in_slot(got, case.choices)
  for e, queue in enumerate(queues(case, expert)[0]):
    block = rows[e * case.capacity : (e + 1) * case.capacity]
    assert block == queue + [None] * (case.capacity - len(queue))


@given(routings(DROPLESS))
@settings(deadline=None, max_examples=80)
def test_without_a_capacity_nothing_is_dropped_and_a_block_has_one_expert(routing):
  case, expert = routing
  got = planned(case)(expert)
  assert float(got.dropped) == 0
  assert_array_equal(got.slot_TxJ < got.pair_S.size, expert < case.experts)
  assert got.pair_S.size == got.expert_N.size * case.block
  # The number of slots is known before the routing is, and enough for the worst.
  pairs = case.tokens * case.choices
  assert got.pair_S.size <= pairs + (case.experts + 1) * case.block
  rows = pair_in_slot(got, case.choices)
  for n, owner in enumerate(got.expert_N):
    block = rows[n * case.block : (n + 1) * case.block]
    assert {int(expert[row]) for row in block if row} == {int(owner)} - {case.experts}


@functools.cache
def moved(case, executor):
  """`dispatch` and `combine` with their pullbacks."""

  def run(expert_TxJ, x_TxD, y_SxD, weight_TxJ, gradients):
    got = assign_slots(expert_TxJ, case.experts, case.capacity, case.block)
    y_NxPxD = y_SxD.reshape(got.blocks, -1, WIDTH)
    rows, dispatch_vjp = jax.vjp(lambda x: dispatch(x, got, executor), x_TxD)
    out, combine_vjp = jax.vjp(lambda y, w: combine(y, got, w, executor), y_NxPxD, weight_TxJ)
    to_x = dispatch_vjp(gradients[0].reshape(rows.shape))[0]
    to_y, to_weight = combine_vjp(gradients[1])
    return got, rows, to_x, out, to_y, to_weight

  return jax.jit(run)


def moved_by_loop(got: SlotPlan, x, y, weight, gradients):
  """The same in NumPy, slot by slot."""
  pairs = pair_in_slot(got, weight.shape[1])
  rows, to_x, out = np.zeros_like(y), np.zeros_like(x), np.zeros_like(x)
  to_y, to_weight = np.zeros_like(y), np.zeros_like(weight)
  for s, pair in enumerate(pairs):
    if pair is None:
      continue
    t, j = pair
    rows[s] = x[t]
    to_x[t] += gradients[0][s]
    out[t] += weight[t, j] * y[s]
    to_y[s] = weight[t, j] * gradients[1][t]
    to_weight[t, j] = y[s] @ gradients[1][t]
  return rows, to_x, out, to_y, to_weight


def slots_of(case):
  if case.capacity is not None:
    return case.experts * case.capacity
  return (-(-case.tokens * case.choices // case.block) + case.experts) * case.block


@given(routings([LIMITED[0], LIMITED[3], DROPLESS[1]]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_rows_sums_and_their_gradients_equal_a_loop_over_slots(routing, seed):
  case, expert = routing
  x, weight, _ = numbers(case, seed)
  # Empty slots hold numbers too: whatever an expert makes of zeros must not reach a token.
  draw = np.random.default_rng([seed, 1]).standard_normal
  slots = slots_of(case)
  y, to_rows, to_out = (
    draw((rows, WIDTH)).astype(np.float32) for rows in (slots, slots, case.tokens)
  )
  gradients = to_rows, to_out
  for executor in EXECUTORS:
    got, *arrays = jax.device_get(moved(case, executor)(expert, x, y, weight, gradients))
    want = moved_by_loop(got, x, y, weight, gradients)
    for name, array, expected in zip(('rows', 'x', 'out', 'y', 'weight'), arrays, want):
      assert_allclose(
        array.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5, err_msg=f'{executor}: {name}'
      )


@functools.cache
def mixture(case, executor):
  """Linear experts between dispatch and combine: `[T, D]`."""

  def run(expert_TxJ, x_TxD, weight_TxJ, kernel_ExDxD):
    got = assign_slots(expert_TxJ, case.experts, case.capacity, case.block)
    x_NxPxD = dispatch(x_TxD, got, executor)
    own_NxDxD = kernel_ExDxD if got.expert_N is None else kernel_ExDxD[got.expert_N]
    y_NxPxD = jnp.einsum('npi,nio->npo', x_NxPxD, own_NxDxD)
    return combine(y_NxPxD, got, weight_TxJ, executor)

  return jax.jit(run)


def mixture_by_loop(case, expert, x, weight, kernel):
  out = np.zeros(x.shape)
  for e, queue in enumerate(queues(case, expert)[0]):
    for t, j in queue:
      out[t] += weight[t, j] * (x[t] @ kernel[e])
  return out


def numbers(case, seed):
  draw = np.random.default_rng(seed).standard_normal
  t, e = case.tokens, case.experts
  shapes = (t, WIDTH), (t, case.choices), (e, WIDTH, WIDTH)
  return [draw(shape).astype(np.float32) for shape in shapes]


@given(routings([LIMITED[0], LIMITED[3], *DROPLESS[:2]]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=80)
def test_a_mixture_of_linear_experts_equals_a_loop_over_pairs(routing, seed):
  case, expert = routing
  x, weight, kernel = numbers(case, seed)
  want = mixture_by_loop(case, expert, x, weight, kernel)
  for executor in EXECUTORS:
    got = mixture(case, executor)(expert, x, weight, kernel)
    assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=executor)


@pytest.mark.parametrize('executor', EXECUTORS)
def test_dropless_equals_a_capacity_of_all_tokens(executor):
  # A token chooses an expert once, so that no expert is asked by more pairs than tokens.
  draw = np.random.default_rng(0)
  limited = Case(9, 2, 3, 9)
  crowded = np.tile(np.array([2, 0], np.int32), (9, 1))
  mixed = np.stack([draw.permutation(4)[:2] for _ in range(9)]).astype(np.int32)
  for expert in (crowded, mixed):
    given_numbers = numbers(limited, 1)
    want = mixture(limited, executor)(expert, *given_numbers)
    assert np.abs(want).max() > 0.1
    for case in DROPLESS[:2]:
      got = mixture(case, executor)(expert, *given_numbers)
      assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_executors_agree_with_finite_differences():
  case = LIMITED[0]
  x, weight, kernel = numbers(case, 2)
  expert = np.random.default_rng(3).integers(0, 4, (9, 2), dtype=np.int32)
  assert queues(case, expert)[1] > 0  # some pairs are dropped
  toward = np.random.default_rng(4).standard_normal((2, *x.shape))
  aside = np.random.default_rng(5).standard_normal(weight.shape)

  def loss(x, weight):
    out = mixture_by_loop(case, expert, x, weight, kernel.astype(np.float64))
    return (np.sin(out) * toward[0]).sum()

  step = 1e-6
  ahead, behind = (
    loss(x + sign * step * toward[1], weight + sign * step * aside) for sign in (1, -1)
  )
  want = (ahead - behind) / (2 * step)
  for executor in EXECUTORS:
    run = mixture(case, executor)
    out, pullback = jax.vjp(lambda x, w, run=run: run(expert, x, w, kernel), x, weight)
    to_x, to_weight = pullback(jnp.cos(out) * toward[0].astype(np.float32))
    slope = (to_x * toward[1]).sum() + (to_weight * aside).sum()
    assert float(slope) == pytest.approx(want, rel=1e-4)
