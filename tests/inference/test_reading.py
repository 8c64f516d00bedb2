"""Bytes that decoding a token reads, against counts by hand."""

import jax
import numpy as np
import pytest

from sparse_lm.inference import pack
from sparse_lm.inference.reading import read_bytes
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of

WIDTH, HIDDEN, VOCAB = 16, 32, 11
ATTENTION = 4 * WIDTH * WIDTH
HEAD = WIDTH * VOCAB


@pytest.fixture(autouse=True)
def any_size(packed_by_bytes):
  """All of these models are small."""


def packed_of(config, down=None):
  """A model that keeps all weights, but for a mask of its down-projection."""
  model = lm.from_config(config, VOCAB)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: draw.normal(0.5 * (a.ndim == 1), 0.3, a.shape).astype('f'), plan_of(model).params
  )
  masks = jax.tree.map(lambda _: None, params)
  if down is not None:
    params['block_0']['mlp']['down']['kernel'] *= down
    masks['block_0']['mlp']['down']['kernel'] = down
  return pack.pack(model, params, masks, {})


@pytest.fixture(scope='module')
def tokens():
  return np.random.default_rng(0).integers(0, VOCAB, (2, 32)).astype(np.int32)


@pytest.mark.parametrize(
  ('fields', 'mlp'),
  [
    ({}, 2 * WIDTH * HIDDEN),
    # Half of the inputs predict; a quarter of what is left is read.
    (
      {'mlp.name': 'predictor_topk', 'mlp.selector': 'exact', 'mlp.density': 0.25},
      WIDTH // 2 * HIDDEN + 0.25 * (WIDTH // 2 * HIDDEN + WIDTH * HIDDEN),
    ),
    # Two of eight experts, and the router.
    ({'mlp.name': 'moe_topk', 'mlp.k': 2}, 2 * 2 * WIDTH * HIDDEN + 8 * WIDTH),
    # Of the down-projection, the rows of the units that the activation selects.
    ({'activation.name': 'topk', 'activation.density': 0.25}, 1.25 * WIDTH * HIDDEN),
    # A gate on a head zeroes it: it is read all the same.
    ({'attention.name': 'head_gate'}, 2 * WIDTH * HIDDEN + 2 * WIDTH),
  ],
)
def test_bytes_that_a_token_reads(fields, mlp, tokens, tiny_config):
  packed = packed_of(tiny_config(**{'data.context': 32} | fields))
  assert read_bytes(packed, tokens).weights == 4 * (ATTENTION + mlp + HEAD)


def test_bytes_of_the_cache_are_those_of_the_heads_that_are_left(tokens, tiny_config):
  model = lm.from_config(tiny_config(data__context=32, model__heads=4, model__kv_heads=4), VOCAB)
  params = jax.tree.map(lambda a: np.ones(a.shape, 'f'), plan_of(model).params)
  masks = jax.tree.map(lambda _: None, params)
  attention = params['block_0']['attention']
  kept = np.repeat(np.arange(4) != 2, WIDTH // 4)  # nothing leaves the third head
  attention['out']['kernel'] *= kept[:, None]
  masks['block_0']['attention']['out']['kernel'] = np.broadcast_to(kept[:, None], (WIDTH, WIDTH))
  slots = 48
  assert (
    read_bytes(pack.pack(model, params, masks, {}), tokens).cache == 4 * 2 * 3 * slots * WIDTH // 4
  )


def test_layers_that_tokens_skip_are_read_as_often_as_they_enter(tokens, tiny_config):
  packed = packed_of(tiny_config(data__context=32, depth__name='token_gate'))
  _, seen = packed.model.apply(packed.variables, tokens, mutable=['gates'])
  share = np.mean(seen['gates']['depth_0']['active'])
  assert 0 < share < 1
  layer = ATTENTION + 2 * WIDTH * HIDDEN
  assert read_bytes(packed, tokens).weights == round(4 * (share * layer + WIDTH + HEAD))
  assert read_bytes(packed, tokens).cache == round(4 * share * 2 * 48 * WIDTH)


def test_selected_units_are_all_read_where_their_rows_are_not_gathered(tokens, tiny_config):
  fields = {'activation.name': 'topk', 'activation.density': 0.6, 'model.hidden': 64}
  config = tiny_config(**fields, data__context=32)
  mask = np.repeat(np.arange(4) == 1, 16)[:, None] & np.ones(WIDTH, bool)  # one tile of four
  packed = packed_of(config, mask)
  down = packed.matrices['block_0/mlp/down/kernel'].runs
  assert down.selects != -2 and down.nbytes < 4 * mask.size / 2
  assert read_bytes(packed, tokens).weights == 4 * (ATTENTION + WIDTH * 64 + HEAD) + down.nbytes
