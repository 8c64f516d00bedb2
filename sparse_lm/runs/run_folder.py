"""Where a run's files lie in its folder, and the format of its config.json."""

import os
import pathlib
from typing import Any

from sparse_lm.core import records
from sparse_lm.core.errors import UserError

CONFIG = 'config.json'
CHECKPOINTS, BEST = 'checkpoints', 'best'
# The layout of a config's keys. It changes where a key is renamed, moved or dropped: a config of an older
# layout cannot be told from one with other settings.
FORMAT = 2


def folder_of(workdir: str) -> tuple[pathlib.Path, str]:
  """The folder of a run, and the name in it of the checkpoints that `workdir` means.

  `<folder>/best` means the checkpoint of lowest validation loss, any other path the newest one.
  """
  folder = pathlib.Path(os.path.expanduser(workdir))
  if folder.name == BEST and not (folder / CONFIG).exists():
    return folder.parent, BEST
  return folder, CHECKPOINTS


def with_format(config: dict[str, Any]) -> dict[str, Any]:
  """The contents of a config.json for the JSON values of a config."""
  return {'format': FORMAT, **config}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The JSON values of the config in a run's folder.

  Raises UserError where the file is missing or damaged, or of another format than this version writes.
  """
  values = records.read(folder / CONFIG, dict[str, Any])
  found = values.pop('format', 1)
  if found != FORMAT:
    raise UserError(
      f'{folder / CONFIG} has format {found}, that of the version that wrote it, and this version reads '
      f'format {FORMAT}; valid: the version that wrote it, or a new workdir'
    )
  return values
