import argparse
import json
import sys

import pytest
from ml_collections import ConfigDict

from configs import base
from sparse_lm.core import config as configs
from sparse_lm.core import errors
from sparse_lm.core.errors import UserError


@pytest.fixture
def write(tmp_path):
  """Writes a config file whose body edits the base config."""

  def to_file(*lines, name='mine.py'):
    body = ['from configs import base', '', 'def get_config():', '  config = base.get_config()']
    file = tmp_path / name
    file.write_text('\n'.join([*body, *(f'  {line}' for line in lines), '  return config', '']))
    return str(file)

  return to_file


def message(path, overrides):
  with pytest.raises(UserError) as error:
    configs.load(path, overrides)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_precedence_is_base_then_method_then_file_then_command_line(write):
  path = write("config.weight.name = 'rigl'", 'config.weight.period = 50', 'config.seed = 3')
  config = configs.load(path, {'weight.drop_fraction': '0.1', 'train.steps': '7'})
  plain = base.get_config()
  assert config.model.to_dict() == plain.model.to_dict()  # from the base
  assert config.weight.end == 0.75  # from the method
  assert (config.weight.period, config.seed) == (50, 3)  # the file over both
  assert (config.weight.drop_fraction, config.train.steps) == (0.1, 7)  # the command line over all
  assert configs.load(path, {'weight.period': '9'}).weight.period == 9


def test_a_name_on_the_command_line_brings_its_defaults_whatever_the_order(write):
  for order in (['weight.name', 'weight.period'], ['weight.period', 'weight.name']):
    values = {'weight.name': 'set', 'weight.period': '5'}
    config = configs.load(write(), {field: values[field] for field in order})
    assert (config.weight.name, config.weight.period) == ('set', 5)
    assert config.weight.drop_fraction == 0.3
    assert config.weight.sparsity == 0.0  # the slot's shared keys stay


def test_every_method_of_a_layer_slot_merges(write):
  config = configs.load(write(), {'activation.name': 'gelu', 'activation.approximate': 'true'})
  assert config.activation.approximate is True
  assert config.activation.otherwise.name == 'relu2' and config.activation.layers == ':'


@pytest.mark.parametrize('field, text, value', [
  ('weight.sparsity', '0.9', 0.9),
  ('weight.sparsity', '0', 0.0),
  ('optimizer.learning_rate', '3e-4', 3e-4),
  ('train.steps', '12', 12),
  ('model.tied', 'true', True),
  ('model.tied', 'False', False),
  ('data.split', '(0.8, 0.1, 0.1)', (0.8, 0.1, 0.1)),
  ('data.split', '[0.8, 0.1, 0.1]', (0.8, 0.1, 0.1)),
  ('weight.dense', "('embed',)", ('embed',)),
  ('data.path', '123', '123'),
  ('weight.budget', 'attention=0.5,mlp=0.9', 'attention=0.5,mlp=0.9'),
  ('train.steps', 12, 12),
  ('weight.sparsity', 0, 0.0),
])  # fmt: skip
def test_a_value_takes_the_type_that_it_replaces(write, field, text, value):
  group, key = field.split('.')
  found = configs.load(write(), {field: text})[group][key]
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize('field, text, kind', [
  ('train.steps', '1.5', 'int'),
  ('train.steps', 'many', 'int'),
  ('train.steps', 'true', 'int'),
  ('weight.sparsity', 'true', 'float'),
  ('weight.sparsity', 'half', 'float'),
  ('model.tied', '1', 'bool'),
  ('data.path', 5, 'str'),
])  # fmt: skip
def test_another_type_is_refused(write, field, text, kind):
  found = message(write(), {field: text})
  assert f'config.{field}=' in found and f'type {kind}' in found


def test_a_default_that_is_a_whole_number_in_the_file_still_takes_a_fraction(write):
  """`config.weight.end = 1` in a file is the float 1.0, as `--config.weight.end=1` is."""
  path = write("config.weight.name = 'rigl'", 'config.weight.end = 1')
  assert configs.load(path, {'weight.end': '0.9'}).weight.end == 0.9


def test_a_wrong_type_for_a_methods_field_in_the_file_is_refused(write):
  path = write("config.weight.name = 'rigl'", "config.weight.period = 'often'")
  assert 'period' in message(path, {})


@pytest.mark.parametrize('field, near', [
  ('weight.sparsty', 'config.weight.sparsity'),
  ('wieght.sparsity', 'config.weight.sparsity'),
  ('sede', 'config.seed'),
  ('model.width.x', 'config.model.width'),
])  # fmt: skip
def test_an_unknown_field_names_the_nearest(write, field, near):
  found = message(write(), {field: '1'})
  assert f"'config.{field}'" in found and f"did you mean '{near}'" in found


def test_a_field_of_another_method_is_unknown(write):
  assert 'period' in message(write(), {'weight.name': 'static', 'weight.period': '5'})
  assert 'period' in message(write('config.weight.period = 5'), {'weight.name': 'static'})


def test_a_group_is_not_a_field(write):
  assert 'group' in message(write(), {'model': '5'})


def test_unknown_methods_name_the_nearest(write):
  found = message(write(), {'weight.name': 'rigel'})
  assert 'config.weight.name' in found and "did you mean 'rigl'" in found and 'static' in found
  assert "did you mean 'gated'" in message(write("config.mlp.name = 'gatd'"), {})


def test_a_missing_file_names_the_nearest(write, tmp_path):
  write()
  found = message(str(tmp_path / 'mien.py'), {})
  assert f"did you mean '{tmp_path / 'mine.py'}'" in found


def test_a_file_without_get_config_is_refused(tmp_path):
  (tmp_path / 'empty.py').write_text('x = 1\n')
  assert 'get_config' in message(str(tmp_path / 'empty.py'), {})


def test_loaded_configs_are_locked_at_every_level(write):
  config = configs.load(write(), {'weight.name': 'rigl'})
  for node in (config, config.model, config.weight):
    with pytest.raises((AttributeError, KeyError)):
      node.unheard_of = 1


def test_json_round_trip(write):
  config = configs.load(write(), {'weight.name': 'rigl', 'weight.sparsity': '0.9'})
  text = json.dumps(configs.to_json(config))
  again = configs.from_json(json.loads(text))
  assert isinstance(again, ConfigDict) and again.is_locked
  assert again.to_dict() == config.to_dict()
  assert again.weight.dense == config.weight.dense and type(again.weight.dense) is tuple
  assert configs.to_json(again) == configs.to_json(config)


def test_flat_names_every_leaf():
  assert configs.flat({'a': {'b': {'c': 1}, 'd': (2, 3)}, 'e': ''}) == {
    'a.b.c': 1, 'a.d': (2, 3), 'e': ''
  }  # fmt: skip


def test_overrides_from_args():
  found = configs.overrides_from_args(['--config.a.b=c', '--config.m=x=1,y=2', '--config.e='])
  assert found == {'a.b': 'c', 'm': 'x=1,y=2', 'e': ''}
  for wrong in ('--config.a', '--steps=3', 'config.a=3', '--config=x'):
    with pytest.raises(UserError, match='unknown argument'):
      configs.overrides_from_args([wrong])


def test_the_command_line_as_a_whole(write, monkeypatch, capsys):
  path = write()
  monkeypatch.setattr(sys, 'argv', ['x', f'--config={path}', '--workdir=w', '--config.seed=4'])
  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument('--workdir')
  arguments, config = configs.from_command_line(parser)
  assert (arguments.workdir, config.seed) == ('w', 4)

  monkeypatch.setattr(sys, 'argv', ['x', f'--config={path}', '--config.sede=4'])
  with pytest.raises(SystemExit) as stop:
    errors.one_line(lambda: configs.from_command_line(argparse.ArgumentParser()))()
  captured = capsys.readouterr().err
  assert stop.value.code == 2 and captured.count('\n') == 1 and 'config.seed' in captured
