"""What the README shows is so: its worked example trains, and its files exist."""

import pathlib
import re

from sparse_lm import list_methods
from sparse_lm.runs.loop import train

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def example(path):
  """The code block that stands for the file at `path`."""
  (found,) = re.findall(rf'```python\n# {path}\n(.*?)```', README, re.S)
  return found


def test_the_weight_method_is_one_file_that_trains(tmp_path, method, tiny_config):
  path = 'sparse_lm/methods/weight/saliency.py'
  method('weight', 'saliency', example(path))
  given = {
    'weight.name': 'saliency',
    'weight.pattern': '2:4',
    'weight.end': 0.5,
    'weight.period': 2,
  }
  config = tiny_config(**given, **{'weight.sparsity': 0.5})
  metrics = train(config, str(tmp_path / 'run'), progress=False)['metrics']
  assert abs(metrics['sparsity_prunable'] - 0.5) < 0.01


def test_the_gate_is_one_file_that_trains_under_a_budget(tmp_path, method, tiny_config):
  path = 'sparse_lm/methods/mlp/skip.py'
  assert example(path).count('\n') <= 40
  method('mlp', 'skip', example(path))
  given = {'mlp.name': 'skip', 'mlp.estimator': 'reinforce', 'budget.target': 0.9}
  metrics = train(tiny_config(**given), str(tmp_path / 'run'), progress=False)['metrics']
  assert 0.5 < metrics['flops_forward_ratio'] < 1.1  # the router comes on top of the dense twin


def test_files_that_it_names_exist():
  links = re.findall(r'\]\(([^)#]+)\)', README)
  local = [link for link in links if not link.startswith('http')]
  assert local
  assert [link for link in local if not (ROOT / link).exists()] == []


def test_its_table_of_methods_is_made_from_what_they_declare():
  table = README.partition('<!-- python -m sparse_lm.list_methods -->\n')[2].partition('\n<!--')[0]
  assert table == list_methods.table(), 'run: python -m sparse_lm.list_methods'


def test_every_method_says_where_it_is_from_and_what_it_saves():
  for link, _, paper, saves, modes in list_methods.rows():
    assert paper and saves and modes, link
    assert not paper.endswith('.') and not saves.endswith('.') and '\n' not in paper + saves
