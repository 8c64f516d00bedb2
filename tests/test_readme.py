"""What the README shows is so: its worked example trains, and its files exist."""

import pathlib
import re

import sparse_lm.methods.weight
from sparse_lm.train.loop import train

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_worked_example_is_one_file_that_trains(tmp_path, monkeypatch, tiny_config):
  (example,) = re.findall(
    r'```python\n# sparse_lm/methods/weight/fading.py\n(.*?)```', README, re.S
  )
  (tmp_path / 'fading.py').write_text(example)
  folders = [*sparse_lm.methods.weight.__path__, str(tmp_path)]
  monkeypatch.setattr(sparse_lm.methods.weight, '__path__', folders)
  config = tiny_config(**{'weight.name': 'fading', 'weight.sparsity': 0.5, 'weight.warm': 0.2})
  metrics = train(config, str(tmp_path / 'run'), progress=False)['metrics']
  assert abs(metrics['sparsity_prunable'] - 0.5) < 0.01


def test_files_that_it_names_exist():
  links = re.findall(r'\]\(([^)#]+)\)', README)
  local = [link for link in links if not link.startswith('http')]
  assert local
  assert [link for link in local if not (ROOT / link).exists()] == []


def test_every_method_is_in_its_table():
  from sparse_lm.core import slots

  table = README.partition('## Methods')[2].partition('\n## ')[0]
  for slot in slots.SLOTS:
    for name in slots.names(slot):
      assert re.search(rf'\b{name}\b', table), f'README lacks the {slot} method {name}'
