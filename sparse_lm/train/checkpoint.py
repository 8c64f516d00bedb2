"""Checkpoints: parameters, sparse state, optimizer, the rest of the state and data, item by item."""

import pathlib
import sys
import zlib
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.sparse import Tree
from sparse_lm.train.state import TrainState

SCHEMA = 1
# Evaluation and export read `params`, `sparse` and `model` and never load an optimizer.
ITEMS = ('params', 'sparse', 'model', 'optimizer')


def _items(state: TrainState) -> dict[str, Tree]:
  return {
    'params': {'trainable': state.trainable, 'ema': state.ema},
    'sparse': state.sparse,
    'model': state.model_state,
    'optimizer': state.opt_state,
  }


def _leaves(item: Tree) -> dict[str, Any]:
  """Arrays by path; `None`s and empty nodes are the template's business. Orbax refuses an empty
  item, hence the schema number in each."""
  return {'schema': np.int32(SCHEMA), **tree.named(item)}


def _digest(leaves: dict[str, Any]) -> int:
  """CRC of an item's bytes: storage notices a torn file by itself, but not every flipped bit."""
  crc = 0
  for path in sorted(leaves):
    crc = zlib.crc32(np.ascontiguousarray(leaves[path]).tobytes(), zlib.crc32(path.encode(), crc))
  return crc


class Checkpoints:
  """The checkpoints of a workdir; the newest three are kept."""

  def __init__(self, workdir: pathlib.Path) -> None:
    self.path = (workdir / 'checkpoints').absolute()
    self._manager = self._open()

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, data: Any) -> None:
    """Writes all items of `state`, and the data iterator's position, under `state.step`."""
    step = int(state.step)
    if step in self.steps():
      return
    items = {name: jax.device_get(_leaves(item)) for name, item in _items(state).items()}
    digests = {name: _digest(leaves) for name, leaves in items.items()}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        **{name: ocp.args.StandardSave(leaves) for name, leaves in items.items()},
        data=grain.checkpoint.CheckpointSave(data),
        meta=ocp.args.JsonSave({'schema': SCHEMA, 'step': step, 'digests': digests}),
      ),
    )

  def restore(self, template: TrainState, data: Any = None, items=ITEMS) -> TrainState | None:
    """The newest intact checkpoint in the shape of `template`, `None` where there is none at all.

    A corrupt one is named on stderr and moved aside, to `corrupt-<step>`. With `data` (a grain
    iterator) its position is set too. `items` that are not named stay the template's.

    Raises:
      UserError: there are checkpoints and all are corrupt.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        return self._restore(step, template, data, items)
      # Storage reports damage by many types; whatever the cause, an older one may be whole.
      except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else repr(error)
        print(f'checkpoint {step} in {self.path} is corrupt: {reason}', file=sys.stderr)
        self._set_aside(step)
        older = self.steps()
        print(f'using checkpoint {older[-1]}' if older else 'no other is left', file=sys.stderr)
    if steps:
      raise UserError(
        f'every checkpoint in {self.path} is corrupt ({", ".join(map(str, steps))}); valid: a copy '
        'of one of them, or a new workdir'
      )
    return None

  def close(self) -> None:
    """Waits for the files."""
    self._manager.close()

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=3, create=True, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(self.path, options=options)

  def _set_aside(self, step: int) -> None:
    self._manager.close()
    (self.path / str(step)).rename(self.path.parent / f'corrupt-{step}')
    self._manager = self._open()

  def _restore(self, step: int, template: TrainState, data: Any, names: tuple) -> TrainState:
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
    wanted = {name: _leaves(item) for name, item in _items(template).items() if name in names}
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
    restored = _items(template) | {
      name: tree.map_named(lambda path, _, name=name: found[name][path], _items(template)[name])
      for name in wanted
    }
    return template.replace(
      step=jax.numpy.int32(step),
      trainable=restored['params']['trainable'],
      ema=restored['params']['ema'],
      sparse=restored['sparse'],
      model_state=restored['model'],
      opt_state=restored['optimizer'],
    )
