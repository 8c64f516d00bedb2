"""Checkpoints, item by item: parameters, sparse state, optimizer, the rest of the state, the position in
the data, and the history of the run."""

import itertools
import json
import pathlib
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.sparse import Tree
from sparse_lm.train.history import History
from sparse_lm.train.state import TrainState
from sparse_lm.train.work import Work

SCHEMA = 3
EVALUATED = ('params', 'sparse', 'model')  # what evaluation and export read
ITEMS = (*EVALUATED, 'optimizer')


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

    Args:
      state: of which `items` are written.
      data: a grain iterator whose position is written too.
      history: is written too.
      numbers: JSON values to keep beside it, if there is no history; see `newest_numbers`.
    """
    step = int(state.step)
    if step in self.steps():
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
    self._manager.save(step, args=ocp.args.Composite(**saved, meta=ocp.args.JsonSave(meta)))

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

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, create=True, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(self.path, options=options)

  def _meta(self, step: int) -> dict[str, Any]:
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
    if meta['schema'] != SCHEMA:
      raise ValueError(f'its format is {meta["schema"]}, and this version reads {SCHEMA}')
    if _json_digest(meta['numbers']) != meta['digests']['numbers']:
      raise ValueError('its numbers do not match their digest')
    return meta

  def _restore(
    self,
    step: int,
    template: TrainState,
    data: Any,
    names: Sequence[str],
    history: History | None,
  ) -> TrainState:
    meta = self._meta(step)
    trees = {name: item for name, item in _items(template).items() if name in names}
    if history is not None:
      trees['history'] = history.masks
    wanted = {name: jax.tree.map(_struct, _leaves(item)) for name, item in trees.items()}
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(leaves) for name, leaves in wanted.items()},
      ),
    )
    for name in wanted:
      if _digest(found[name]) != meta['digests'][name]:
        raise ValueError(f'the bytes of item {name!r} do not match their digest')
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
