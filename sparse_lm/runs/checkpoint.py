"""Checkpoints of a run.

A checkpoint has separate items for parameters, sparse state, model state, optimizer, the position in the
data, and the run's history, so that evaluation can read some of them alone.
"""

import itertools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TypedDict

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_lm.core import records, tree
from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.tree import Tree
from sparse_lm.core.version import VERSION, WRITTEN_BY, format_mismatch
from sparse_lm.runs import digests, storage
from sparse_lm.runs.digests import Leaf
from sparse_lm.runs.history import History
from sparse_lm.runs.run_folder import CHECKPOINTS, CONFIG
from sparse_lm.runs.workdir import fixed, read_json
from sparse_lm.train.states import TrainState
from sparse_lm.train.work import Work

SCHEMA = 4
EVALUATED = ('params', 'sparse', 'model')  # the items that evaluation and export read
ITEMS = (*EVALUATED, 'optimizer')


class _Meta(TypedDict):
  """The contents of the item `meta`.

  Attributes:
    leaves: for each item, the digest of every leaf by its path.
    digests: digests of `numbers` and, if it was saved, of the position in the data.
    run: digests of the files that identify the run, from `Checkpoints._run`.
  """

  schema: int
  step: int
  numbers: dict[str, object] | None
  leaves: dict[str, dict[str, int]]
  digests: dict[str, int]
  run: dict[str, str]


def _items(state: TrainState) -> dict[str, Tree]:
  return {
    'params': {'trainable': state.trainable, 'ema': state.ema},
    'sparse': state.sparse,
    'model': state.model_state,
    'optimizer': {
      'moments': state.opt_state,
      'control': state.control,
      'signals': state.signals,
    },
  }


def _leaves(item: Tree) -> dict[str, Leaf]:
  """Returns the arrays of an item by path. `None`s and empty nodes are restored from the template.

  Orbax refuses an empty item, so each item also holds the schema number.
  """
  return {'schema': np.asarray(SCHEMA, np.int32), **tree.named(item)}


def _free(path: pathlib.Path) -> pathlib.Path:
  """Returns the first of `path`, `path.1`, `path.2`, ... that does not exist."""
  names = (path.with_name(f'{path.name}.{i}') if i else path for i in itertools.count())
  return next(name for name in names if not name.exists())


class Checkpoints:
  """The checkpoints in a folder of a workdir.

  Args:
    workdir: the run's folder.
    folder: name of the folder of checkpoints.
    keep: how many of the newest checkpoints are kept, `None` = all.
  """

  def __init__(
    self, workdir: pathlib.Path, folder: str = CHECKPOINTS, keep: int | None = 3
  ) -> None:
    self.path = (workdir / folder).absolute()
    self._keep = keep
    self._plain = storage.PlainPath(self.path)
    self._manager = self._open()

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, in ascending order."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    state: TrainState,
    data: grain.DatasetIterator | None = None,
    history: History | None = None,
    items: Sequence[str] = ITEMS,
    numbers: dict[str, float] | None = None,
  ) -> None:
    """Writes a checkpoint under `state.step`.

    The first checkpoint of a folder is read back at once. This is how the run finds out whether the
    storage library works on this file system and with the folder's name.

    Args:
      state: the training state.
      data: a grain iterator whose position is written too.
      history: the run's history, which is written too.
      items: the items of `state` to write.
      numbers: JSON values to write if there is no history; see `newest_numbers`.

    Raises:
      UserError: the checkpoint cannot be written, or not be read back.
    """
    step, steps = int(state.step), self.steps()
    if step in steps:
      return
    trees = {name: item for name, item in _items(state).items() if name in items}
    if history is not None:
      trees['history'], numbers = history.masks, history.numbers()
    arrays = {name: jax.device_get(_leaves(item)) for name, item in trees.items()}
    small = {'numbers': digests.of_json(numbers)}
    saved = {name: ocp.args.PyTreeSave(leaves) for name, leaves in arrays.items()}
    if data is not None:
      small['data'] = digests.of_json(data.get_state())
      saved['data'] = grain.checkpoint.CheckpointSave(data)
    leaves = {name: digests.of_leaves(found) for name, found in arrays.items()}
    meta = {'schema': SCHEMA, 'step': step, 'numbers': numbers, 'leaves': leaves, 'digests': small}
    meta |= {'run': self._run(), WRITTEN_BY: VERSION}
    doing = 'written'
    try:
      with storage.quiet():
        self._manager.save(step, args=ocp.args.Composite(**saved, meta=ocp.args.JsonSave(meta)))
        if not steps:
          doing = 'read after it was written'
          self._read(step, self._meta(step), arrays, whole=True)
    # The storage library raises many types of exceptions, also for a full disk.
    except Exception as error:
      self.set_aside_after(step - 1)
      raise UserError(
        f'checkpoint {step} in {self.path} cannot be {doing} ({storage.first_line(error)}); valid: a '
        'folder that you own, with free space, on a file system that keeps what is written'
      ) from error

  def restore(
    self,
    template: TrainState,
    data: grain.DatasetIterator | None = None,
    items: Sequence[str] = ITEMS,
    history: History | None = None,
  ) -> TrainState | None:
    """Restores the newest intact checkpoint. Returns `None` if there is no checkpoint.

    Args:
      template: a state of arrays or shape structs.
      data: a grain iterator whose position is restored too.
      items: the items to read; the others are taken from `template`.
      history: the run's history, which is restored too; its masks are a template.

    Raises:
      UserError: there are checkpoints, and all of them are corrupt.
    """
    steps, faults = self.steps(), []
    for step in reversed(steps):
      try:
        with storage.quiet():
          state = self._restore(step, template, data, items, history)
      # The storage library raises many types of exceptions. An older checkpoint may be intact.
      except Exception as error:
        faults.append(f'checkpoint {step} ({storage.first_line(error)})')
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

  def restore_leaves(self, step: int, item: str, template: Tree) -> Tree:
    """Reads and checks some leaves of one item.

    Args:
      step: a step that has a checkpoint.
      item: one of `ITEMS`.
      template: arrays or shape structs for the wanted leaves, nested as in the item: `{'trainable':
        {'params': {'block_0': ...}}}` in the item 'params', for example.

    Returns:
      A tree like `template`.

    Raises:
      UserError: the checkpoint does not have one of the leaves, or one of them is damaged.
    """
    wanted = tree.named(template)
    try:
      with storage.quiet():
        meta = self._meta(step)
        saved = meta['leaves'].get(item, {})
        missing = sorted(wanted.keys() - saved.keys())
        found = {} if missing else self._read(step, meta, {item: wanted}, whole=False)[item]
    except Exception as error:  # as in `restore`
      raise UserError(
        f'checkpoint {step} in {self.path} is damaged ({storage.first_line(error)}); valid: an intact '
        'copy of it, or another checkpoint'
      ) from error
    if missing:
      raise unknown(f'leaf of {item} in checkpoint {step} of {self.path}', missing[0], saved)
    return tree.map_named(lambda path, _: found[path], template)

  def newest_numbers(self) -> records.JsonObject | None:
    """Returns the numbers of the newest checkpoint, `None` if there is no checkpoint.

    If the checkpoint is damaged, a line on stderr says so, and the result is `None`.
    """
    if not self.steps():
      return None
    step = self.steps()[-1]
    try:
      with storage.quiet():
        return self._meta(step)['numbers']
    except Exception as error:  # as in `restore`
      print(
        f'corrupt: checkpoint {step} in {self.path} ({storage.first_line(error)})', file=sys.stderr
      )
      return None

  def work(self, step: int) -> Work:
    """Returns the FLOPs that training had spent at an intact checkpoint."""
    return Work(**self._meta(step)['numbers']['work'])

  def delete(self, steps: Sequence[int]) -> None:
    """Removes these checkpoints."""
    for step in steps:
      self._manager.delete(step)

  def set_aside_after(self, step: int) -> None:
    """Renames the checkpoints after `step` to `corrupt-<step>`, because training writes them again.

    Args:
      step: the step of the newest intact checkpoint.
    """
    newer = [other for other in self.steps() if other > step]
    if newer:
      self._manager.close()
      for other in newer:
        (self.path / str(other)).rename(_free(self.path.parent / f'corrupt-{other}'))
      self._manager = self._open()

  def close(self) -> None:
    """Waits until all files are written."""
    self._manager.close()
    self._plain.close()

  def _run(self) -> dict[str, str]:
    """Returns digests of config.json and tokenizer.json, without the fields that may change."""
    paths = [self.path.parent / name for name in (CONFIG, 'tokenizer.json')]
    return {path.name: records.digest(fixed(read_json(path))) for path in paths if path.exists()}

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, create=True, enable_async_checkpointing=False
    )
    try:
      return ocp.CheckpointManager(self._plain.path, options=options)
    except OSError:
      raise
    except Exception as error:  # as in `restore`: opening reads the metadata of each checkpoint
      raise UserError(
        f'{self.path} cannot be opened ({storage.first_line(error)}); valid: an intact copy of it'
      ) from error

  def _meta(self, step: int) -> _Meta:
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
    if isinstance(meta, dict) and meta.get('schema') != SCHEMA:
      raise ValueError(format_mismatch('it', meta.get('schema'), SCHEMA, meta.get(WRITTEN_BY)))
    records.check(meta, _Meta)
    if meta['step'] != step:
      raise ValueError(f'its metadata is of step {meta["step"]}')
    for name, digest in self._run().items():
      if digest != meta['run'].get(name):
        raise ValueError(f'it was saved with another {name}')
    if digests.of_json(meta['numbers']) != meta['digests']['numbers']:
      raise ValueError('its numbers do not match their digest')
    return meta

  def _read(
    self,
    step: int,
    meta: _Meta,
    wanted: Mapping[str, Mapping[str, Leaf | jax.ShapeDtypeStruct]],
    whole: bool,
  ) -> dict[str, dict[str, jax.Array]]:
    """Reads leaves of a checkpoint and compares them with their digests.

    Args:
      step: a step that has a checkpoint.
      meta: the contents of its item `meta`.
      wanted: for each item, arrays or shape structs by the path of the leaf.
      whole: if True, an item may have no other leaves than the wanted ones.

    Raises an exception of any type if the checkpoint is damaged.
    """
    for name, leaves in wanted.items():
      saved = meta['leaves'].get(name, {})
      if other := sorted(
        (saved.keys() ^ leaves.keys()) if whole else (leaves.keys() - saved.keys())
      ):
        raise ValueError(
          f'leaf {other[0]} of item {name!r} is either missing in the checkpoint or unknown to the run'
        )
    reading = {
      name: storage.reading({path: storage.struct(leaf) for path, leaf in leaves.items()})
      for name, leaves in wanted.items()
    }
    try:
      found = self._manager.restore(step, args=ocp.args.Composite(**reading))
    except Exception as error:
      named = storage.named_leaves(error, {path for leaves in wanted.values() for path in leaves})
      if not named:
        raise
      reason = storage.first_line(error)
      raise ValueError(f'leaf {", ".join(named)} cannot be read: {reason}') from error
    for name in wanted:
      digests.check(name, found[name], meta['leaves'][name])
    return {name: found[name] for name in wanted}

  def _restore(
    self,
    step: int,
    template: TrainState,
    data: grain.DatasetIterator | None,
    names: Sequence[str],
    history: History | None,
  ) -> TrainState:
    trees = {name: item for name, item in _items(template).items() if name in names}
    if history is not None:
      trees['history'] = history.masks
    meta = self._meta(step)
    wanted = {name: _leaves(item) for name, item in trees.items()}
    found = self._read(step, meta, wanted, whole=True)
    if data is not None:
      position = grain.checkpoint.CheckpointRestore(data)
      self._manager.restore(step, args=ocp.args.Composite(data=position))
      if digests.of_json(data.get_state()) != meta['digests']['data']:
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
      signals=restored['optimizer']['signals'],
    )
