import argparse
import json
import pathlib
import sys

import pytest
from ml_collections import ConfigDict

from configs import base
from sparse_lm.commands.config_arguments import from_command_line, overrides_from_args
from sparse_lm.commands.parser import one_line
from sparse_lm.core import records
from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.runs import configs
from sparse_lm.runs.run_folder import with_format


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
  assert config.activation.fallback.name == 'relu2' and config.activation.layers == ':'


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
  ('weight.distribution', 'attention=0.5,mlp=0.9', 'attention=0.5,mlp=0.9'),
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


@pytest.mark.parametrize('body, said', [
  ('x = 1', 'defines no get_config()'),
  ('def get_config(:', 'fails in line 1: SyntaxError'),
  ('import nothing_of_that_name', 'fails in line 1: ModuleNotFoundError'),
  ('def get_config():\n  return 1 / 0', 'fails in line 2: ZeroDivisionError: division by zero'),
  ('def get_config():\n  raise ValueError("two\\nlines")', 'fails in line 2: ValueError: two lines'),
  ('def get_config(name):\n  return name', 'TypeError'),
  ('def get_config():\n  return 5', 'returns a value of type int'),
  ('def get_config():\n  pass', 'returns a value of type NoneType'),
  ('def get_config():\n  return {"seed": 0}', 'returns a value of type dict'),
  ('import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict()', 'config.weight'),
  ('from configs import base\ndef get_config():\n  c = base.get_config()\n  c.model.width = "128"\n'
   '  return c', 'fails in line 4: TypeError'),
  ('from configs import base\ndef get_config():\n  c = base.get_config()\n  del c.model.width\n'
   '  return c', 'the config has no config.model.width'),
  ('from configs import base\ndef get_config():\n  c = base.get_config()\n'
   '  c.optimizer.clip = float("nan")\n  return c', 'config.optimizer.clip=nan is not valid'),
])  # fmt: skip
def test_a_config_file_that_fails_is_one_line_that_says_where(tmp_path, body, said):
  (tmp_path / 'mine.py').write_text(body + '\n')
  assert said in message(str(tmp_path / 'mine.py'), {})


def test_a_config_file_that_is_no_text_is_one_line(tmp_path):
  (tmp_path / 'mine.py').write_bytes(b'\xff\x00\xfe')
  assert 'mine.py fails' in message(str(tmp_path / 'mine.py'), {})


@pytest.mark.parametrize('text', ['(' * 9000, '{[]: 1}', '-', "b'x'", '0x' + 'f' * 5000, '9' * 400])
@pytest.mark.parametrize('field', ['train.steps', 'weight.sparsity', 'data.split', 'weight.dense'])
def test_text_that_cannot_be_converted_is_refused(write, field, text):
  assert f'config.{field}=' in message(write(), {field: text})


def test_an_abbreviated_field_suggests_the_full_name(write):
  for short, whole in (('lr', 'learning_rate'), ('wd', 'weight_decay')):
    found = message(write(), {f'optimizer.{short}': '1'})
    assert f"did you mean 'config.optimizer.{whole}'" in found


def test_help_lists_every_field_of_the_config_and_what_is_valid(write, monkeypatch, capsys):
  path = write("config.weight.name = 'rigl'")
  monkeypatch.setattr(
    sys, 'argv', ['x', f'--config={path}', '--config.mlp.name=moe_topk', '--help']
  )
  with pytest.raises(SystemExit):
    from_command_line(argparse.ArgumentParser(allow_abbrev=False))
  rows = [
    row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines() if '--config.' in row
  ]
  shown = {row[0].partition('=')[0]: row[1] if len(row) > 1 else '' for row in rows}
  config = configs.load(path, {'mlp.name': 'moe_topk'})
  assert {f'--config.{field}' for field in configs.flat(config)} <= set(shown)
  assert shown['--config.weight.drop_fraction'] == 'a float32 number in [0, 1]'
  assert shown['--config.mlp.experts'] == 'a whole number in [1, 2^16]'


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
  found = overrides_from_args(['--config.a.b=c', '--config.m=x=1,y=2', '--config.e='])
  assert found == {'a.b': 'c', 'm': 'x=1,y=2', 'e': ''}
  for wrong in ('--config.a', '--steps=3', 'config.a=3', '--config=x'):
    with pytest.raises(UserError, match='unknown argument'):
      overrides_from_args([wrong])


def test_the_command_line_as_a_whole(write, monkeypatch, capsys):
  path = write()
  monkeypatch.setattr(sys, 'argv', ['x', f'--config={path}', '--workdir=w', '--config.seed=4'])
  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument('--workdir')
  arguments, config = from_command_line(parser)
  assert (arguments.workdir, config.seed) == ('w', 4)

  monkeypatch.setattr(sys, 'argv', ['x', f'--config={path}', '--config.sede=4'])
  with pytest.raises(SystemExit) as stop:
    one_line(lambda: from_command_line(argparse.ArgumentParser()))()
  captured = capsys.readouterr().err
  assert stop.value.code == 2 and captured.count('\n') == 1 and 'config.seed' in captured


@pytest.fixture
def parent(tmp_path):
  """The workdir of a run on data that differs from the defaults in every field."""
  config = base.get_config()
  config.data.update(
    {'source': 'files', 'path': 'a/*.txt', 'split': (0.8, 0.1, 0.1), 'tokenizer': 'bpe'}
    | {'vocab_size': 512, 'context': 32, 'batch': 4}
  )
  folder = tmp_path / 'parent'
  folder.mkdir()
  (folder / 'config.json').write_text(records.sealed(with_format(configs.to_json(config))))
  return str(folder), config.data.to_dict()


@pytest.mark.parametrize('below', ['', '/best'])
def test_a_run_that_starts_from_another_has_its_data(below, parent, write):
  workdir, data = parent
  sizes = 'config.data.update({"context": 64, "batch": 16})'  # as in configs/tiny.py
  for path in (write(), write(sizes), write(f'config.init_from = {workdir + below!r}', sizes)):
    config = configs.load(path, {'init_from': workdir + below})
    assert config.data.to_dict() == data and config.init_from == workdir + below
    assert config.is_locked


def test_a_run_in_a_folder_named_best_is_a_parent_too(parent, write):
  workdir, data = parent
  renamed = pathlib.Path(workdir).rename(pathlib.Path(workdir).with_name('best'))
  assert configs.load(write(), {'init_from': str(renamed)}).data.to_dict() == data


def test_data_that_the_command_line_or_the_file_names_is_not_inherited(parent, write):
  workdir, data = parent
  overrides = {'init_from': workdir, 'data.path': 'b.txt', 'data.batch': '8'}
  assert configs.load(write(), overrides).data.to_dict() == data | {'path': 'b.txt', 'batch': 8}
  named = write("config.data.path = 'c.txt'", "config.data.source = 'tfds'")
  config = configs.load(named, {'init_from': workdir})
  assert config.data.to_dict() == data | {'path': 'c.txt', 'source': 'tfds'}
  # A value that is the default can be asked for on the command line.
  plain = base.get_config().data.to_dict()
  given = {f'data.{field}': value for field, value in plain.items()}
  assert configs.load(write(), {'init_from': workdir} | given).data.to_dict() == plain


@pytest.mark.parametrize('text', [None, '{', '[1]', '{"data": 3}', '{"data": {"nonsense": 1}}'])
def test_a_parent_without_a_config_changes_nothing(text, tmp_path, write):
  if text is not None:
    (tmp_path / 'config.json').write_text(text)
  config = configs.load(write(), {'init_from': str(tmp_path)})
  assert config.data.to_dict() == base.get_config().data.to_dict()


def test_a_saved_config_of_another_version_is_one_line():
  """Without the name of a method, or with a value of another type in any field."""
  config = configs.load('configs/rigl.py')
  path = pathlib.Path('run/config.json')
  assert configs.of_run(configs.to_json(config), path) == config
  for field in configs.flat(config):
    *groups, last = field.split('.')
    of_slot = bool(groups) and groups[0] in slots.SLOTS
    required = of_slot and last in slots.SLOT_KEYS[groups[0]]
    for change in ('null', 'group', *(('missing',) if required else ())):
      values = node = configs.to_json(config)
      for group in groups:
        node = node[group]
      if change == 'missing':
        del node[last]
      else:
        node[last] = None if change == 'null' else {'a': {'b': 1}}
      with pytest.raises(
        UserError, match=r'^run/config\.json does not fit this version, sparse_lm [\w.]+: '
      ) as refused:
        configs.of_run(values, path)
      assert '\n' not in str(refused.value)


def test_fields_that_a_saved_config_lacks_take_their_defaults():
  """Every field that is not a key of a slot, one at a time: of `base.py`, or of a method's class."""
  config = configs.load('configs/rigl.py')
  rest, lacking = configs.flat(config), []
  default = configs.flat(base.get_config()) | {
    f'{group}.{key}': value
    for slot in slots.SLOTS
    for group, node in slots.groups(slot, config)
    for key, value in slots.defaults(slot, node.name).items()
  }
  for field in rest:
    *groups, last = field.split('.')
    if groups and groups[0] in slots.SLOTS and last in slots.SLOT_KEYS[groups[0]]:
      continue
    values = node = configs.to_json(config)
    for group in groups:
      node = node[group]
    del node[last]
    found = configs.flat(configs.of_run(values, pathlib.Path('run/config.json')))
    assert found == rest | {field: default[field]}
    lacking.append(field)
  assert {'seed', 'model.norm_epsilon', 'model.biases', 'weight.period', 'data.context'} <= {
    *lacking
  }


def test_deriving_a_config_leaves_the_first_as_it_was(tiny_config):
  config = tiny_config()
  before = configs.to_json(config)
  derived = configs.derive(config, {'weight.name': 'wanda', 'weight.sparsity': 0.75}, ('weight',))
  assert derived.weight.name == 'wanda' and derived.weight.sparsity == 0.75
  assert configs.to_json(config) == before and config.is_locked and config.weight.is_locked


def test_a_config_of_the_package_is_found_from_every_folder(tmp_path, monkeypatch):
  here = configs.load('configs/rigl.py')
  monkeypatch.chdir(tmp_path)
  assert configs.load('configs/rigl.py') == here
  assert "did you mean 'configs/rigl.py'" in message('configs/rigle.py', {})
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'rigl.py').write_text('def get_config(): return 1\n')
  assert 'returns a value of type int' in message(
    'configs/rigl.py', {}
  )  # the working folder's first
