"""The README is short, its example trains, and its files, modules and configs exist."""

import importlib.util
import pathlib
import re

from sparse_lm.runs.loop import train

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def test_it_is_short():
  assert len(README.encode()) <= 12_000


def test_its_weight_method_is_one_file_that_trains(tmp_path, method, tiny_config):
  path = 'sparse_lm/methods/weight/saliency.py'
  (example,) = re.findall(rf'```python\n# {path}\n(.*?)```', README, re.S)
  method('weight', 'saliency', example)
  given = {
    'weight.name': 'saliency',
    'weight.pattern': '2:4',
    'weight.end': 0.5,
    'weight.period': 2,
  }
  config = tiny_config(**given, **{'weight.sparsity': 0.5})
  metrics = train(config, str(tmp_path / 'run'), progress=False)['metrics']
  assert abs(metrics['sparsity_prunable'] - 0.5) < 0.01


def test_files_that_it_names_exist():
  links = re.findall(r'\]\(([^)#]+)\)', README)
  local = [link for link in links if not link.startswith('http')]
  assert local
  assert [link for link in local if not (ROOT / link).exists()] == []


def test_modules_and_configs_of_its_commands_exist():
  modules = set(re.findall(r'python -m ([\w.]+)', README))
  assert {'sparse_lm.train', 'sparse_lm.pack', 'experiments.run'} <= modules
  assert [name for name in modules if importlib.util.find_spec(name) is None] == []
  configs = re.findall(r'--config=(\S+)', README)
  assert configs
  assert [path for path in configs if not (ROOT / path).exists()] == []


def test_make_has_the_targets_that_it_names():
  targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M))
  named = set(re.findall(r'\bmake ([a-z-]+)', README))
  assert {'ablation', 'test'} <= named <= targets
