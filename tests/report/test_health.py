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


def drawn(axes):
  """Label -> y values, but for the line that marks even routing."""
  return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()[1:]}


def test_a_panel_for_each_layer_and_one_for_the_entropies(tmp_path):
  figure = health.router_health(write(tmp_path / 'metrics.jsonl', layers=2, experts=4))
  first, second, entropies = figure.axes
  assert drawn(first) == drawn(second) == {str(e): [(e + 1) / 20, (e + 1) / 40] for e in range(4)}
  assert first.get_lines()[0].get_ydata()[0] == 1 / 4
  assert drawn(entropies) == {
    'block_0/mlp': [1 / 20, 1 / 40],
    'block_1/mlp': [1 + 1 / 20, 1 + 1 / 40],
  }
  assert entropies.get_lines()[0].get_ydata()[0] == pytest.approx(math.log(4))


def test_panels_that_are_not_needed_are_removed(tmp_path):
  figure = health.router_health(write(tmp_path / 'metrics.jsonl', layers=4, experts=2))
  assert len(figure.axes) == 5


def test_a_run_without_experts_is_refused(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps({'step': 1, 'loss': 2.0}) + '\n')
  with pytest.raises(UserError, match='no load'):
    health.router_health(path)
  with pytest.raises(UserError, match='no file'):
    health.router_health(tmp_path / 'other.jsonl')
