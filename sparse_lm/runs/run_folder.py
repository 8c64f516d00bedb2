"""Names of the files in a run's folder, and the format of its config.json."""

import os
import pathlib

from sparse_lm.core import records
from sparse_lm.core.errors import UserError
from sparse_lm.core.records import JsonObject
from sparse_lm.core.version import VERSION, WRITTEN_BY, format_mismatch

CONFIG, LOG = 'config.json', 'metrics.jsonl'
CHECKPOINTS, BEST = 'checkpoints', 'best'
WEIGHTS = 'weights'  # an imported or pruned model has this folder instead of checkpoints
# The version of the config's keys. It is raised when a key is renamed, moved or dropped.
FORMAT = 3


def folder_of(workdir: str) -> tuple[pathlib.Path, str]:
  """Returns the folder of a run, and the name of its folder of checkpoints.

  `<folder>/best` stands for the checkpoint of lowest validation loss at the final density. Any other path
  stands for the newest checkpoint.
  """
  folder = pathlib.Path(os.path.expanduser(workdir))
  if folder.name == BEST and not (folder / CONFIG).exists():
    return folder.parent, BEST
  return folder, CHECKPOINTS


def with_format(config: JsonObject) -> JsonObject:
  """Returns the contents of config.json for the JSON values of a config."""
  return {'format': FORMAT, WRITTEN_BY: VERSION, **config}


def read_config(folder: pathlib.Path) -> JsonObject:
  """Returns the JSON values of the config in a run's folder.

  Raises UserError if the file is missing or damaged, or has another format than this version writes.
  """
  values = records.read(folder / CONFIG, records.OBJECT)
  found, written_by = values.pop('format', 1), values.pop(WRITTEN_BY, None)
  if found != FORMAT:
    raise UserError(
      f'{format_mismatch(str(folder / CONFIG), found, FORMAT, written_by)}; valid: the version that '
      'wrote it, or a new workdir'
    )
  return values
