"""Orbax, as this project uses it: quiet, in folders of any name, some leaves of an item at a time."""

import contextlib
import glob
import logging
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping

import jax
import orbax.checkpoint as ocp

from sparse_lm.runs.digests import Leaf

LOGS = ('absl', 'asyncio')  # where Orbax and its event loop write tracebacks
# What the exceptions of arrays say that arrive after another one has failed.
LATE = ('Event loop is closed', 'Encountered error while reading array index')


def first_line(error: Exception) -> str:
  """The beginning of what an exception says; storage's go on for pages."""
  lines = str(error).strip().splitlines()
  return lines[0][:160] if lines else repr(error)


def named_leaves(error: Exception, paths: Iterable[str]) -> list[str]:
  """The leaves that an exception of the storage names, however deep in its text."""
  text = str(error)
  return [path for path in paths if f'"{path}/' in text or f"'{path}/" in text]


def struct(leaf: Leaf | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """What to restore, on this process' first device wherever it was saved."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


def reading(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
  """Restores these leaves of an item; its others are not read."""
  arguments = ocp.checkpoint_utils.construct_restore_args(dict(leaves))
  return ocp.args.PyTreeRestore(dict(leaves), restore_args=arguments, partial_restore=True)


class PlainPath:
  """A path that Orbax can use for a folder of any name.

  Orbax finds files by a glob of their whole path, and TensorStore takes a backslash for a slash. Where
  they would look elsewhere, the path is a link to the folder, which `close` removes.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self._links: tempfile.TemporaryDirectory | None = None
    self.path = folder
    if glob.escape(str(folder)) != str(folder) or '\\' in str(folder):
      folder.mkdir(parents=True, exist_ok=True)
      self._links = tempfile.TemporaryDirectory(prefix='sparse_lm.')
      self.path = pathlib.Path(self._links.name) / 'checkpoints'
      self.path.symlink_to(folder)

  def close(self) -> None:
    """Removes the link, if there is one."""
    if self._links is not None:
      self._links.cleanup()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Leaves it to the exception to say what went wrong in the block.

  Orbax logs the traceback of each of its threads, and closes its event loop at the first failure, on
  which TensorStore's threads print a traceback for every array that they still deliver to it, or that
  cannot be read either. All may come after the block has failed, so they stay silenced then.
  """
  hook, logs = sys.unraisablehook, [logging.getLogger(name) for name in LOGS]

  def without_late_arrays(raised: 'sys.UnraisableHookArgs') -> None:
    if not str(raised.exc_value).startswith(LATE):
      hook(raised)

  sys.unraisablehook, before = without_late_arrays, [log.disabled for log in logs]
  for log in logs:
    log.disabled = True
  yield
  sys.unraisablehook = hook
  for log, disabled in zip(logs, before):
    log.disabled = disabled
