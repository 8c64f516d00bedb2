"""The figure of a router's load and entropy shows what the run logged."""

import json
import math

import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.report import health


def write(path, layers, experts, steps=(20, 40)):
  lines = []
  for step in steps:
    line = {'step': step, 'loss': 2.0}
    for layer in range(layers):
      line |= {f'block_{layer}/mlp/load/{e}': (e + 1) / step for e in range(experts)}
      line[f'block_{layer}/mlp/entropy'] = layer + 1 / step
    lines.append(line)
  # What evaluation saw is another text, and no part of the training's curve.
  lines.append({'step': steps[-1], 'val/block_0/mlp/load/0': 9.0, 'val_loss': 2.0})
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def rows(axes):
  """The colours' values by the name of the row."""
  (mesh,) = axes.collections
  names = [text.get_text() for text in axes.get_yticklabels()]
  return dict(zip(names, mesh.get_array().reshape(len(names), -1).tolist()))


def test_a_panel_for_each_layer_and_one_for_the_entropies(tmp_path):
  figure = health.router_health(write(tmp_path / 'metrics.jsonl', layers=2, experts=4))
  first, second, _, entropies, _ = figure.axes
  wanted = {f'expert {e}': [(e + 1) / 20, (e + 1) / 40] for e in range(4)}
  assert rows(first) == rows(second) == wanted
  assert [axes.get_title() for axes in (first, second)] == ['block_0/mlp', 'block_1/mlp']
  assert rows(entropies) == {
    'block_0/mlp': [1 / 20, 1 / 40],
    'block_1/mlp': [1 + 1 / 20, 1 + 1 / 40],
  }
  assert entropies.collections[0].get_clim()[1] == pytest.approx(math.log(4))


def test_the_colours_of_all_layers_share_one_scale_whose_label_names_the_even_load(tmp_path):
  figure = health.router_health(write(tmp_path / 'metrics.jsonl', layers=3, experts=2))
  *layers, bar, _, _ = figure.axes
  assert len(layers) == 3 and {axes.collections[0].get_clim() for axes in layers} == {(0, 2 / 20)}
  assert 'even load: 50 %' in bar.get_ylabel()


def test_a_run_without_experts_is_refused(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps({'step': 1, 'loss': 2.0}) + '\n')
  with pytest.raises(UserError, match='no logged load of experts'):
    health.router_health(path)
  with pytest.raises(UserError, match=r'has no other\.jsonl; valid: a run that was trained'):
    health.router_health(tmp_path / 'other.jsonl')
