"""Pruning a trained model with several rules, each with its own method."""

import numpy as np
import pytest

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.prune import prune
from sparse_lm.runs.loop import train
from sparse_lm.runs.trained import load


@pytest.fixture(scope='module')
def parent(tiny_config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('parent')
  train(tiny_config(train__steps=4), str(workdir), progress=False)
  return str(workdir)


def test_a_run_is_pruned_by_rules_and_loads(parent, tmp_path):
  fields = {
    'weight.order': ('mlp', 'attention'),
    'weight.rules.mlp.name': 'wanda',
    'weight.rules.mlp.sparsity': 0.5,
    'weight.rules.attention.name': 'magnitude',
    'weight.rules.attention.sparsity': 0.25,
  }
  result = prune(parent, str(tmp_path / 'out'), fields, segments=4)
  pruned, dense = load(str(tmp_path / 'out')), load(parent)
  before, after = tree.named(dense.params), tree.named(pruned.params)
  masks = tree.named(pruned.masks)
  assert {(path.split('/')[1], float(np.mean(mask))) for path, mask in masks.items()} == {
    ('mlp', 0.5),
    ('attention', 0.75),
  }
  for path, mask in masks.items():
    assert (np.asarray(after[path]) == np.where(mask, before[path], 0)).all()
    if 'attention' in path:  # the largest magnitudes of each matrix
      size = np.abs(np.asarray(before[path]))
      assert size[np.asarray(mask)].min() >= size[~np.asarray(mask)].max()
  # 4 matrices of 16 x 16 and 2 of 16 x 32.
  assert result['metrics']['sparsity_prunable'] == (1024 * 0.25 + 1024 * 0.5) / 2048


@pytest.mark.parametrize(('fields', 'words'), [
  ({'weight.order': ('mlp',), 'weight.rules.mlp.name': 'rigl'},
   ["config.weight.rules.mlp.name='rigl'", 'valid: alps, magnitude, snip, sparsegpt, wanda']),
  ({'weight.order': ('mlp',), 'weight.rules.mlp.name': 'magnitude', 'weight.rules.mlp.apply': 'soft'},
   ["config.weight.rules.mlp.apply='soft'", 'valid: masked']),
  ({'weight.name': 'magnitude', 'weight.sparsity': 0.5, 'weight.apply': 'straight_through'},
   ["config.weight.apply='straight_through'", 'valid: masked']),
  ({'weight.order': ('mlp',), 'weight.rules.mlp.name': 'wanda', 'weight.rules.mlp.sparsity': 0.5,
    'weight.rules.mlp.match': ('mlp', 'embed'), 'weight.dense': ('norm',),
    'weight.rules.mlp.pattern': 'unstructured'},
   ['no calibration signal for embed/']),
])  # fmt: skip
def test_refused_pruning_is_one_line_and_leaves_no_folder(fields, words, parent, tmp_path):
  with pytest.raises(UserError) as refused:
    prune(parent, str(tmp_path / 'out'), fields, segments=4)
  line = str(refused.value)
  assert '\n' not in line and all(word in line for word in words), line
  assert not list(tmp_path.iterdir())
