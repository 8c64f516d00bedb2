"""Packed models with thresholds (TEAL, CATS) read only what is left, and decode like unpacked ones."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.formats.gather import Gather
from sparse_lm.inference.pack import pack
from sparse_lm.layers.threshold import THRESHOLDS
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost
from sparse_lm.train import thresholds
from sparse_lm.train.layerwise import InMemory

VOCAB, LAYERS = 23, 1
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, 16)).astype(np.int32)
GATED = {'mlp__name': 'gated', 'model__layers': LAYERS, 'model__width': 64, 'model__hidden': 256}
MODELS = {
  'teal': {'activation__name': 'silu', 'site__name': 'teal', 'site__density': 0.2},
  'cats': {
    'activation__name': 'cats',
    'activation__inner__name': 'silu',
    'activation__density': 0.2,
  },
}
GATHERED = {
  'teal': ('query', 'key', 'value', 'out', 'gate', 'up', 'down'),
  'cats': ('down',),
}


@pytest.fixture(params=['teal', 'cats'])
def model(request, tiny_config):
  config = tiny_config(**GATED, **MODELS[request.param])
  model = lm.from_config(config, VOCAB)
  draw = np.random.default_rng(1)
  params = jax.tree.map(
    lambda a: draw.normal(0, 0.2, a.shape).astype('f'), plan_of(model).variables['params']
  )
  state = thresholds.calibrate(model, InMemory(params, {}), {}, [TOKENS[1:]])
  return request.param, model, params, state


def refuse(*_):
  raise AssertionError('all rows of a kernel were read')


def test_decoding_gathers_rows_and_equals_the_unpacked_model(model, packed_by_bytes, monkeypatch):
  name, model, params, state = model
  packed = pack(model, params, jax.tree.map(lambda _: None, params), state)
  gathered = {path for path, m in packed.matrices.items() if m.runs.selects == -2}
  want = {path for path in packed.matrices if path.split('/')[-2] in GATHERED[name]}
  assert gathered == want and len(want) == LAYERS * len(GATHERED[name])
  whole = model.apply({'params': params, **state}, TOKENS[:1])[0]
  for given in ({'params': params, **state}, packed.variables):
    decoder = Decoder(model, given)
    logits, cache, _ = decoder.begin([TOKENS[0, :5]])
    assert_allclose(logits[0], whole[4], rtol=1e-3, atol=1e-3)
    with monkeypatch.context() as patch:
      patch.setattr(Gather, 'matmul', refuse)
      for place in range(5, 9):
        token, position = TOKENS[:1, place], np.full(1, place, np.int32)
        logits, cache = decoder.decode(given, cache, token, position)
        assert_allclose(logits[0], whole[place], rtol=1e-3, atol=1e-3)


def test_ledger_charges_the_matrices_for_what_is_left(model):
  name, model, *_ = model
  ledger, twin = plan_of(model).ledger, plan_of(lm.dense_twin(model)).ledger
  charged = ('up', 'down') if name == 'cats' else GATHERED[name]
  assert ledger.keys() == twin.keys()
  for path, matmul in ledger.items():
    left, whole = (cost.forward_flops({path: entry}, {}) for entry in (matmul, twin[path]))
    own = matmul.kernel is not None and matmul.kernel.split('/')[-2] in charged
    assert left == pytest.approx(whole * (0.2 if own else 1.0)), path
  assert not plan_of(lm.dense_twin(model)).variables.get(THRESHOLDS)
