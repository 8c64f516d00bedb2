"""Checkpoints, item by item: parameters, sparse state, optimizer, the rest of the state, the position in
the data, and the history of the run."""

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
EVALUATED = ('params', 'sparse', 'model')  # what evaluation and export read
ITEMS = (*EVALUATED, 'optimizer')


class _Meta(TypedDict):
  """What an item `meta` holds.

  Attributes:
    leaves: by item, the digest of each of its leaves by path.
    digests: of `numbers`, and of the position in the data where that was saved.
    run: `Checkpoints._run` when it was saved.
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
  """Arrays by path; `None`s and empty nodes are the template's business. Orbax refuses an empty
  item, hence the schema number in each."""
  return {'schema': np.asarray(SCHEMA, np.int32), **tree.named(item)}


def _free(path: pathlib.Path) -> pathlib.Path:
  """`path`, or `path.1`, `path.2`, ... where that exists."""
  names = (path.with_name(f'{path.name}.{i}') if i else path for i in itertools.count())
  return next(name for name in names if not name.exists())


class Checkpoints:
  """The checkpoints in a folder of a workdir; the newest `keep` are kept, or all."""

  def __init__(
    self, workdir: pathlib.Path, folder: str = CHECKPOINTS, keep: int | None = 3
  ) -> None:
    self.path = (workdir / folder).absolute()
    self._keep = keep
    self._plain = storage.PlainPath(self.path)
    self._manager = self._open()

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
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
    # Storage reports a full disk, say, by many types.
    except Exception as error:
      self.set_aside_after(step - 1)
      raise UserError(
        f'checkpoint {step} in {self.path} cannot be {doing} ({storage.first_line(error)}); valid: a '
        'folder of yours, with room, on a file system that keeps what is written'
      ) from error

  def restore(
    self,
    template: TrainState,
    data: grain.DatasetIterator | None = None,
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
        with storage.quiet():
          state = self._restore(step, template, data, items, history)
      # Storage reports damage by many types; whatever the cause, an older one may be whole.
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
    """Some leaves of one item, checked; the others are not read.

    Args:
      step: that has a checkpoint.
      item: one of `ITEMS`.
      template: arrays or shape structs at their places in the item, such as `{'trainable': {'params':
        {'block_0': ...}}}` in 'params'.

    Returns:
      A tree like `template`.

    Raises:
      UserError: the checkpoint has no such leaf, or one of these leaves is damaged.
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
        f'checkpoint {step} in {self.path} is damaged ({storage.first_line(error)}); valid: a copy of it '
        'that is whole, or another checkpoint'
      ) from error
    if missing:
      raise unknown(f'leaf of {item} in checkpoint {step} of {self.path}', missing[0], saved)
    return tree.map_named(lambda path, _: found[path], template)

  def newest_numbers(self) -> records.JsonObject | None:
    """The numbers that the newest checkpoint was saved with; `None` where there is none, or, said
    aloud, where it is damaged."""
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
    self._plain.close()

  def _run(self) -> dict[str, str]:
    """By file, the digest of what says which run the weights are of, but for fields that may change."""
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
    except Exception as error:  # as in `restore`: it reads what each checkpoint says of itself
      raise UserError(
        f'{self.path} cannot be opened ({storage.first_line(error)}); valid: a copy of it that is whole'
      ) from error

  def _meta(self, step: int) -> _Meta:
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
    if isinstance(meta, dict) and meta.get('schema') != SCHEMA:
      raise ValueError(format_mismatch('it', meta.get('schema'), SCHEMA, meta.get(WRITTEN_BY)))
    records.check(meta, _Meta)
    if meta['step'] != step:
      raise ValueError(f'it is of step {meta["step"]}')
    for name, digest in self._run().items():
      if digest != meta['run'].get(name):
        raise ValueError(f'it was saved beside another {name}')
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
    """Leaves of some items of a checkpoint, checked against their digests.

    Args:
      wanted: by item, arrays or shape structs by the path of the leaf.
      whole: whether these are to be all leaves of those items.

    Raises an exception of any type where what is read is damaged.
    """
    for name, leaves in wanted.items():
      saved = meta['leaves'].get(name, {})
      if other := sorted(
        (saved.keys() ^ leaves.keys()) if whole else (leaves.keys() - saved.keys())
      ):
        raise ValueError(
          f'leaf {other[0]} of item {name!r} is in the run or in meta, and not in both'
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
