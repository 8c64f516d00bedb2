"""Checkpoints, item by item: parameters, sparse state, optimizer, the rest of the state, the position in
the data, and the history of the run."""

import contextlib
import glob
import itertools
import json
import logging
import pathlib
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_lm.core import records, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.runs.history import History
from sparse_lm.runs.workdir import fixed, read_json
from sparse_lm.train.states import TrainState
from sparse_lm.train.work import Work

SCHEMA = 3
EVALUATED = ('params', 'sparse', 'model')  # what evaluation and export read
ITEMS = (*EVALUATED, 'optimizer')


class _Meta(TypedDict):
  """What an item `meta` holds: `run` is `Checkpoints._run` when it was saved."""

  schema: int
  step: int
  numbers: dict[str, Any] | None
  digests: dict[str, int]
  run: dict[str, str]


def _items(state: TrainState) -> dict[str, Tree]:
  return {
    'params': {'trainable': state.trainable, 'ema': state.ema},
    'sparse': state.sparse,
    'model': state.model_state,
    'optimizer': {'moments': state.opt_state, 'control': state.control},
  }


def _leaves(item: Tree) -> dict[str, Any]:
  """Arrays by path; `None`s and empty nodes are the template's business. Orbax refuses an empty
  item, hence the schema number in each."""
  return {'schema': np.asarray(SCHEMA, np.int32), **tree.named(item)}


def _digest(leaves: dict[str, Any]) -> int:
  """CRC of an item's bytes: storage notices a torn file by itself, but not every flipped bit."""
  crc = 0
  for path in sorted(leaves):
    crc = zlib.crc32(np.ascontiguousarray(leaves[path]).tobytes(), zlib.crc32(path.encode(), crc))
  return crc


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:160] if lines else repr(error)


def _free(path: pathlib.Path) -> pathlib.Path:
  """`path`, or `path.1`, `path.2`, ... where that exists."""
  names = (path.with_name(f'{path.name}.{i}') if i else path for i in itertools.count())
  return next(name for name in names if not name.exists())


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
  """What to restore, on this process' first device wherever it was saved."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


@contextlib.contextmanager
def _quiet_storage() -> Iterator[None]:
  """Leaves it to the exception to say what went wrong in the block.

  Orbax logs the traceback of each of its threads, and closes its event loop at the first failure, on
  which TensorStore's threads print a traceback for every array that they still deliver to it. Both
  may come after the block has failed, so they stay silenced then.
  """
  hook, log = sys.unraisablehook, logging.getLogger('absl')

  def without_late_arrays(raised: Any) -> None:
    if not (raised.exc_type is RuntimeError and str(raised.exc_value) == 'Event loop is closed'):
      hook(raised)

  sys.unraisablehook, before = without_late_arrays, log.disabled
  log.disabled = True
  yield
  sys.unraisablehook, log.disabled = hook, before


def _json_digest(values: Any) -> int:
  """CRC of JSON values."""
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


class Checkpoints:
  """The checkpoints in a folder of a workdir; the newest `keep` are kept, or all."""

  def __init__(
    self, workdir: pathlib.Path, folder: str = 'checkpoints', keep: int | None = 3
  ) -> None:
    self.path = (workdir / folder).absolute()
    self._keep = keep
    self._links: tempfile.TemporaryDirectory | None = None
    self._manager = self._open()

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    state: TrainState,
    data: Any = None,
    history: History | None = None,
    items: Sequence[str] = ITEMS,
    numbers: dict[str, float] | None = None,
  ) -> None:
    """Writes a checkpoint under `state.step`.

    The first one of a folder is read again before it counts: whether the storage can deal with the
    file system and the folder's name is known only then.

    Args:
      state: of which `items` are written.
      data: a grain iterator whose position is written too.
      history: is written too.
      numbers: JSON values to keep beside it, if there is no history; see `newest_numbers`.

    Raises:
      UserError: it cannot be written, or what was written cannot be read.
    """
    step, steps = int(state.step), self.steps()
    if step in steps:
      return
    trees = {name: item for name, item in _items(state).items() if name in items}
    if history is not None:
      trees['history'], numbers = history.masks, history.numbers()
    arrays = {name: jax.device_get(_leaves(item)) for name, item in trees.items()}
    digests = {name: _digest(leaves) for name, leaves in arrays.items()}
    digests['numbers'] = _json_digest(numbers)
    saved = {name: ocp.args.StandardSave(leaves) for name, leaves in arrays.items()}
    if data is not None:
      digests['data'] = _json_digest(data.get_state())
      saved['data'] = grain.checkpoint.CheckpointSave(data)
    meta = {'schema': SCHEMA, 'step': step, 'numbers': numbers, 'digests': digests}
    meta |= {'run': self._run()}
    doing = 'written'
    try:
      with _quiet_storage():
        self._manager.save(step, args=ocp.args.Composite(**saved, meta=ocp.args.JsonSave(meta)))
        if not steps:
          doing = 'read after it was written'
          self._read(step, arrays)
    # Storage reports a full disk, say, by many types.
    except Exception as error:
      self.set_aside_after(step - 1)
      raise UserError(
        f'checkpoint {step} in {self.path} cannot be {doing} ({_first_line(error)}); valid: a folder '
        'of yours, with room, on a file system that keeps what is written'
      ) from error

  def restore(
    self,
    template: TrainState,
    data: Any = None,
    items: Sequence[str] = ITEMS,
    history: History | None = None,
  ) -> TrainState | None:
    """The newest intact checkpoint in the shape of `template`, `None` where there is none at all.

    Args:
      template: arrays or shape structs; `items` that are not named stay as they are there.
      data: a grain iterator whose position is set too.
      history: is set too; its masks are a template as well.

    Raises:
      UserError: there are checkpoints and all are corrupt.
    """
    steps, faults = self.steps(), []
    for step in reversed(steps):
      try:
        with _quiet_storage():
          state = self._restore(step, template, data, items, history)
      # Storage reports damage by many types; whatever the cause, an older one may be whole.
      except Exception as error:
        faults.append(f'checkpoint {step} ({_first_line(error)})')
        continue
      if faults:
        print(f'corrupt: {"; ".join(faults)}; using checkpoint {step}', file=sys.stderr)
      return state
    if faults:
      raise UserError(
        f'{self.path} has no intact checkpoint: {"; ".join(faults)}; valid: a copy of one of them, '
        'or a new workdir'
      )
    return None

  def newest_numbers(self) -> dict[str, Any] | None:
    """The numbers that the newest checkpoint was saved with; `None` where there is none, or, said
    aloud, where it is damaged."""
    if not self.steps():
      return None
    step = self.steps()[-1]
    try:
      with _quiet_storage():
        return self._meta(step)['numbers']
    except Exception as error:  # as in `restore`
      print(f'corrupt: checkpoint {step} in {self.path} ({_first_line(error)})', file=sys.stderr)
      return None

  def work(self, step: int) -> Work:
    """What training had spent at an intact checkpoint."""
    return Work(**self._meta(step)['numbers']['work'])

  def delete(self, steps: Sequence[int]) -> None:
    """Removes these checkpoints."""
    for step in steps:
      self._manager.delete(step)

  def set_aside_after(self, step: int) -> None:
    """Moves checkpoints newer than `step`, the newest intact one, to `corrupt-<step>`: training on
    from an older one will write theirs anew."""
    newer = [other for other in self.steps() if other > step]
    if newer:
      self._manager.close()
      for other in newer:
        (self.path / str(other)).rename(_free(self.path.parent / f'corrupt-{other}'))
      self._manager = self._open()

  def close(self) -> None:
    """Waits for the files."""
    self._manager.close()
    if self._links is not None:
      self._links.cleanup()

  def _run(self) -> dict[str, str]:
    """By file, the digest of what says which run the weights are of, but for fields that may change."""
    paths = [self.path.parent / name for name in ('config.json', 'tokenizer.json')]
    return {path.name: records.digest(fixed(read_json(path))) for path in paths if path.exists()}

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, create=True, enable_async_checkpointing=False
    )
    try:
      return ocp.CheckpointManager(self._plain_path(), options=options)
    except OSError:
      raise
    except Exception as error:  # as in `restore`: it reads what each checkpoint says of itself
      raise UserError(
        f'{self.path} cannot be opened ({_first_line(error)}); valid: a copy of it that is whole'
      ) from error

  def _plain_path(self) -> pathlib.Path:
    """`self.path`, or a link to it where Orbax, which finds files by a glob of their whole path, or
    TensorStore, which takes a backslash for a slash, would look elsewhere."""
    if glob.escape(str(self.path)) == str(self.path) and '\\' not in str(self.path):
      return self.path
    self.path.mkdir(parents=True, exist_ok=True)
    self._links = self._links or tempfile.TemporaryDirectory(prefix='sparse_lm.')
    link = pathlib.Path(self._links.name) / 'checkpoints'
    if not link.is_symlink():
      link.symlink_to(self.path)
    return link

  def _meta(self, step: int) -> dict[str, Any]:
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
    if isinstance(meta, dict) and meta.get('schema') != SCHEMA:
      raise ValueError(f'its format is {meta.get("schema")}, and this version reads {SCHEMA}')
    records.check(meta, _Meta)
    if meta['step'] != step:
      raise ValueError(f'it is of step {meta["step"]}')
    for name, digest in self._run().items():
      if digest != meta['run'].get(name):
        raise ValueError(f'it was saved beside another {name}')
    if _json_digest(meta['numbers']) != meta['digests']['numbers']:
      raise ValueError('its numbers do not match their digest')
    return meta

  def _read(self, step: int, wanted: dict[str, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Items of a checkpoint in the shape of `wanted`, checked against their digests, and its meta.
    Raises an exception of any type where the checkpoint is damaged."""
    meta = self._meta(step)
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(leaves) for name, leaves in wanted.items()},
      ),
    )
    for name in wanted:
      if _digest(found[name]) != meta['digests'][name]:
        raise ValueError(f'the bytes of item {name!r} do not match their digest')
    return found, meta

  def _restore(
    self,
    step: int,
    template: TrainState,
    data: Any,
    names: Sequence[str],
    history: History | None,
  ) -> TrainState:
    trees = {name: item for name, item in _items(template).items() if name in names}
    if history is not None:
      trees['history'] = history.masks
    wanted = {name: jax.tree.map(_struct, _leaves(item)) for name, item in trees.items()}
    found, meta = self._read(step, wanted)
    if data is not None:
      position = grain.checkpoint.CheckpointRestore(data)
      self._manager.restore(step, args=ocp.args.Composite(data=position))
      if _json_digest(data.get_state()) != meta['digests']['data']:
        raise ValueError("the data's position does not match its digest")
    restored = _items(template) | {
      name: tree.map_named(lambda path, _, name=name: found[name][path], item)
      for name, item in trees.items()
    }
    if history is not None:
      history.restore(meta['numbers'], restored['history'])
    return template.replace(
      step=jax.numpy.int32(step),
      trainable=restored['params']['trainable'],
      ema=restored['params']['ema'],
      sparse=restored['sparse'],
      model_state=restored['model'],
      opt_state=restored['optimizer']['moments'],
      control=restored['optimizer']['control'],
    )
