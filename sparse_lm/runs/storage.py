"""Helpers for Orbax: short errors, folders of any name, and reading some leaves of an item."""

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
# Messages of further exceptions that arrive after the first failure.
LATE = ('Event loop is closed', 'Encountered error while reading array index')


def first_line(error: Exception) -> str:
  """Returns the beginning of an exception's message. Orbax's messages are pages long."""
  lines = str(error).strip().splitlines()
  return lines[0][:160] if lines else repr(error)


def named_leaves(error: Exception, paths: Iterable[str]) -> list[str]:
  """Returns the leaves that the text of an Orbax exception names."""
  text = str(error)
  return [path for path in paths if f'"{path}/' in text or f"'{path}/" in text]


def struct(leaf: Leaf | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns the shape struct to restore a leaf with, on this process' first device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


def reading(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
  """Returns Orbax' arguments to restore these leaves of an item and no others."""
  arguments = ocp.checkpoint_utils.construct_restore_args(dict(leaves))
  return ocp.args.PyTreeRestore(dict(leaves), restore_args=arguments, partial_restore=True)


class PlainPath:
  """A path that Orbax can use for a folder of any name.

  Orbax finds files by a glob of their whole path, and TensorStore treats a backslash as a slash. For
  folders whose names these would misread, the path is a link to the folder, which `close` removes.
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
  """Suppresses the tracebacks that Orbax and TensorStore print while the block runs.

  The exception of the block says what went wrong. But Orbax also logs a traceback for each of its threads
  and closes its event loop at the first failure. TensorStore's threads then print a traceback for every
  further array. These can arrive after the block has failed, so they stay suppressed after a failure.
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
