"""The metrics and timings of the evaluation of speed."""

import jax
import numpy as np
import pytest

from sparse_lm import speed as speed_command
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.speed import Speed
from sparse_lm.inference import pack, workload
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of

WIDTH, HIDDEN, VOCAB = 16, 32, 11
ATTENTION = 4 * WIDTH * WIDTH
HEAD = WIDTH * VOCAB


@pytest.fixture(autouse=True)
def any_size(packed_by_bytes):
  """All of these models are small."""


def packed_of(config):
  model = lm.from_config(config, VOCAB)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: draw.normal(0.5 * (a.ndim == 1), 0.3, a.shape).astype('f'), plan_of(model).params
  )
  return pack.pack(model, params, jax.tree.map(lambda _: None, params), {})


@pytest.fixture(scope='module')
def tokens():
  return np.random.default_rng(0).integers(0, VOCAB, (2, 32)).astype(np.int32)


def test_a_packed_model_is_timed_beside_its_twin(tokens, tiny_config):
  packed = packed_of(tiny_config(data__context=32))
  twin = pack.dense_twin(packed.model)
  both = workload.workload(tokens.ravel(), 32, batch=2)
  assert both.batch == 2 and both.prompt == 32 - workload.DECODED
  model = EvalModel.of_packed(packed, twin)
  row = Speed(repeats=2).compare({'x': model}, EvalData(tokens.ravel(), 32))['x']
  for what in ('decode', 'prefill'):
    low, mid, high = (row[f'{what}_speedup{end}'] for end in ('_low', '', '_high'))
    assert 0 < low <= mid <= high
  assert row['kept_weights'] == row['dense_kept_weights'] == 1
  assert row['cache_bytes'] == row['dense_cache_bytes'] == 2 * 4 * WIDTH * 48
  assert row['weights_bytes'] == row['dense_weights_bytes'] == pack.total_bytes(packed.variables)
  step = row['read_bytes'] / (row['bandwidth'] * row['memory_bandwidth'])
  assert 1e3 * step == pytest.approx(row['decode_ms'])
  shown = speed_command.table({'x': row})
  assert 'its dense twin' in shown and f'{row["decode_speedup"]:.2f} (' in shown


def test_kept_weights_are_those_of_connected_units(tiny_config):
  model = lm.from_config(tiny_config(), VOCAB)
  draw = np.random.default_rng(0)
  params = {p: draw.normal(size=a.shape).astype('f') for p, a in plan_of(model).shapes.items()}
  up, down = (f'block_0/mlp/{name}/kernel' for name in ('up', 'down'))
  masks = {path: draw.random(params[path].shape) < 0.5 for path in (up, down)}
  # Two neurons that nothing leaves, and one that nothing enters.
  masks[down][:2], masks[up][:, 2] = False, False
  alive = masks[up].any(axis=0) & masks[down].any(axis=1)
  asked = masks[up].sum() + masks[down].sum()
  # Packing removes neurons that nothing leaves; one that nothing enters keeps its outgoing weights.
  gone = ~masks[down].any(axis=1)
  left = asked - masks[up][:, gone].sum()
  params = {p: np.where(masks[p], w, 0) if p in masks else w for p, w in params.items()}
  as_tree = pack.nested(params)
  packed = pack.pack(model, as_tree, tree.map_named(lambda path, _: masks.get(path), as_tree), {})
  dense = ATTENTION + HEAD
  assert gone.sum() == 2 and alive.sum() == HIDDEN - 3
  assert pack.kept_weights(packed) == pytest.approx((dense + left) / (dense + 2 * WIDTH * HIDDEN))
  assert pack.kept_weights(pack.dense_twin(model)) == 1


@pytest.mark.parametrize(('context', 'batch'), [(16, 1), (32, 3)])
def test_a_text_or_context_that_is_too_short_is_named(context, batch, tokens):
  with pytest.raises(UserError, match=f'--batch={batch} with config.data.context={context}'):
    Speed().run(EvalModel(None, {}), EvalData(tokens.ravel(), context, batch))


def test_a_model_that_is_not_packed_has_no_speed(tokens):
  with pytest.raises(UserError, match='valid: a packed model'):
    Speed().run(EvalModel(None, {}), EvalData(tokens.ravel(), 32))


def test_one_model_is_measured_as_several_are(tokens, tiny_config):
  packed = packed_of(tiny_config(data__context=32))
  model = EvalModel.of_packed(packed, packed)
  values = Speed(repeats=1, what=('prefill',)).run(model, EvalData(tokens.ravel(), 32, batch=2))
  # Only prefilling was asked for: nothing is said of decoding.
  assert values['prefill_tokens_per_second'] > 0 and 'decode_ms' not in values
  assert {name.removeprefix('dense_') for name in values} >= {'weights_bytes', 'kept_weights'}
