"""Reading a config from the command line: `--config=FILE` and `--config.field=value`."""

import argparse
import sys

from ml_collections import ConfigDict

from sparse_lm.commands.parser import local_path
from sparse_lm.core.errors import UserError
from sparse_lm.runs.configs import BASE, flat, load, ranges_of


def from_command_line(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, ConfigDict]:
  """Parses `--config=FILE`, `--config.field=value` and the other arguments of `parser`.

  `--help` also lists the fields of the config.

  Returns:
    The arguments of `parser`, and the config.

  Raises UserError for unknown arguments, and as `configs.load` does.
  """
  parser.add_argument(
    '--config', type=local_path, required=True, help='config file, such as configs/tiny.py'
  )
  add_fields_to_help(parser)
  arguments, rest = parser.parse_known_args()
  return arguments, load(arguments.config, overrides_from_args(rest))


def add_fields_to_help(parser: argparse.ArgumentParser, groups: tuple[str, ...] = ()) -> None:
  """Makes `--help` list the fields of the config that can be overridden.

  Args:
    parser: the command's parser.
    groups: the groups to list, by default all.
  """
  if not {'-h', '--help'}.isdisjoint(sys.argv):
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _fields(sys.argv[1:], groups)


def _fields(arguments: list[str], groups: tuple[str, ...]) -> str:
  """Returns the help text for the fields of the config that `arguments` name, or of the base config."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument('--config', default=str(BASE))
  known, rest = parser.parse_known_args(arguments)
  overrides = [argument for argument in rest if argument.startswith('--config.')]
  config = load(known.config, overrides_from_args(overrides))
  numbers = ranges_of(config)
  rows = [
    (f'  --config.{field}={value}', str(numbers.get(field, '')))
    for field, value in flat(config).items()
    if not groups or field.partition('.')[0] in groups
  ]
  width = max((len(setting) for setting, valid in rows if valid), default=0)
  return '\n'.join(
    [
      f'fields of {known.config} with their values, and the valid range of numbers. Each method has '
      'its\nown fields; to list them, name the method: --config.weight.name=NAME --help',
      *(f'{setting:{width}}  {valid}'.rstrip() for setting, valid in rows),
    ]
  )


def overrides_from_args(arguments: list[str]) -> dict[str, str]:
  """Converts `['--config.a.b=c', ...]` to `{'a.b': 'c'}`. Raises UserError for other arguments."""
  overrides = {}
  for argument in arguments:
    field, equals, value = argument.removeprefix('--config.').partition('=')
    if not argument.startswith('--config.') or not equals:
      raise UserError(f'unknown argument {argument!r}; valid: --config.FIELD=VALUE, or see --help')
    overrides[field] = value
  return overrides
