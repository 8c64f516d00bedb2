"""Outliers against NumPy, and the distribution that prune makes of them."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from sparse_lm import prune as command
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.prune import prune
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.train import layerwise, outliers
from sparse_lm.train.layerwise import InMemory

SEGMENTS, LAYERS = 8, 3


@pytest.fixture(scope='module')
def parent(tiny_config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('parent')
  train(tiny_config(model__layers=LAYERS, train__steps=2), str(workdir), progress=False)
  return str(workdir)


@pytest.fixture(scope='module')
def trained(parent):
  return load(parent)


@pytest.fixture(scope='module')
def tokens(trained):
  data, config = setup(trained.config).data, trained.config
  return layerwise.calibration(data.tokens['train'], SEGMENTS, config.data.context, config.seed)


def by_numpy(trained, tokens, multiple, kernels):
  """The fraction of outliers of these kernels in each block, from the activations of whole passes."""
  model, found = trained.program.model, {}
  _, seen = model.apply(
    {'params': trained.params}, tokens, capture_intermediates=True, mutable=['intermediates']
  )
  outputs, weights = tree.named(seen['intermediates']), tree.named(trained.params)
  sources = dict.fromkeys(('query', 'key', 'value'), 'norm_1') | {
    'out': 'attention/attention',
    'up': 'norm_2',
    'down': 'mlp/activation',
  }
  for layer in range(LAYERS):
    block, scores = f'block_{layer}', []
    for kernel in kernels:
      x = np.asarray(
        outputs[f'{block}/{sources[kernel.rpartition("/")[2]]}/__call__/0'], np.float64
      )
      w = np.asarray(weights[f'{block}/{kernel}/kernel'], np.float64)
      scores.append((np.abs(w) * np.linalg.norm(x.reshape(-1, len(w)), axis=0)[:, None]).ravel())
    scores = np.concatenate(scores)
    found[block] = np.mean(scores > multiple * scores.mean())
  return found


MLP = ('mlp/up', 'mlp/down')
ALL = (*MLP, *(f'attention/{name}' for name in ('query', 'key', 'value', 'out')))


def test_fractions_are_those_of_the_dense_model(trained, tokens):
  found = outliers.fractions(
    trained.program.model,
    InMemory(trained.params, trained.masks),
    trained.model_state,
    {'all': {**_kernels(trained.params)}, 'mlp': {**_kernels(trained.params, '/mlp/')}},
    {'all': 2.0, 'mlp': 1.5},
    [tokens[:5], tokens[5:]],
  )
  for name, multiple, kernels in (('all', 2.0, ALL), ('mlp', 1.5, MLP)):
    want = by_numpy(trained, tokens, multiple, kernels)
    assert found[name].keys() == want.keys()
    assert_allclose(list(found[name].values()), list(want.values()), atol=2e-3)
    assert min(want.values()) > 0.02


def _kernels(params, part='block'):
  return tree.map_named(lambda p, x: 1.0 if p.endswith('kernel') and part in p else None, params)


def test_prune_writes_the_map_and_keeps_the_mean(parent, trained, tokens, tmp_path):
  asked = {'weight.name': 'wanda', 'weight.sparsity': 0.5, 'weight.distribution': 'owl:2:0.1'}
  result = prune(
    parent, str(tmp_path / 'out'), asked | {'weight.pattern': 'unstructured'}, SEGMENTS
  )
  assert result['distribution'] == {'config.weight': 'owl:2:0.1'}
  pruned = load(str(tmp_path / 'out'))
  shares = by_numpy(trained, tokens, 2.0, ALL)
  raised = np.array(list(shares.values()))
  raised = 0.2 * (raised - raised.min()) / np.ptp(raised)
  masks = tree.named(pruned.masks)
  for layer, up in enumerate(raised - raised.mean()):
    own = [np.asarray(m) for path, m in masks.items() if path.startswith(f'block_{layer}/')]
    assert_allclose(np.mean(np.concatenate([m.ravel() for m in own])), 0.5 + up, atol=0.01)
  assert result['metrics']['sparsity_prunable'] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'weight.pattern': '2:4'}, ["'2:4' cannot express", "distribution='uniform'"]),
    (
      {'weight.sparsity': 0.97, 'weight.pattern': 'unstructured'},
      ['a sparsity of 1.0', 'a smaller LAMBDA'],
    ),
    ({'weight.distribution': 'owl:1'}, ["'owl:1'", 'owl:M:LAMBDA']),
  ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_measured(
  fields, words, parent, tmp_path, monkeypatch
):
  monkeypatch.setattr(outliers, 'fractions', lambda *_: pytest.fail('measured'))
  asked = {'weight.name': 'wanda', 'weight.sparsity': 0.5, 'weight.distribution': 'owl', **fields}
  with pytest.raises(UserError) as refused:
    command.prune(parent, str(tmp_path / 'out'), asked, SEGMENTS)
  line = str(refused.value)
  assert '\n' not in line and all(word in line for word in words), line
  assert not list(tmp_path.iterdir())
