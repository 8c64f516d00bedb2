"""Removing what masks have dropped as a whole: neurons, heads, experts and layers.

Works on arrays by path. A unit is removed where no row of it leaves its module: then nothing depends
on it, whatever else of it is left.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from sparse_lm.core.groups import Group, Member
from sparse_lm.core.paths import Place

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Shrunk:
  """What is left.

  Attributes:
    params: by path.
    masks: bool, by path; a parameter without one is kept in full.
    kept: of experts that lost some, by the path of their module: int32, which are left.
    removed_layers: numbers of the layers that add nothing.
    removed: lines for people, one for each group that lost units.
  """

  params: Arrays
  masks: Arrays
  kept: Arrays
  removed_layers: tuple[int, ...]
  removed: list[str]


def shrink(params: Arrays, masks: Arrays, groups: Iterable[Group], closed: Iterable[int]) -> Shrunk:
  """Removes dead units; layers in `closed` run for no input."""
  out = Shrunk(dict(params), dict(masks), {}, (), [])
  layers = {group.kind: group.units for group in groups}.get('layer', 0)
  dead = [i for i in range(layers) if i in closed or _adds_nothing(out, groups, i)]
  out.removed_layers = tuple(dead[: layers - 1])  # a model keeps one layer
  for arrays in (out.params, out.masks):
    for path in [path for path in arrays if Place.parse(path).layer in out.removed_layers]:
      del arrays[path]
  if out.removed_layers:
    out.removed.append(f'layers {", ".join(map(str, out.removed_layers))}: removed')
  for group in groups:
    if group.kind != 'layer' and not group.dynamic:
      _shrink_group(out, group)
  return out


def _leaving(group: Group) -> list[Member]:
  """The members through which units leave their module."""
  return [member for member in group.members if member.axis == -2]


def _adds_nothing(out: Shrunk, groups: Iterable[Group], layer: int) -> bool:
  members = [m for g in groups if Place.parse(g.path).layer == layer for m in _leaving(g)]
  biases = [out.params.get(_bias(m.path)) for m in members]
  return (
    len(members) >= 2  # of attention and of the MLP
    and all(m.path in out.masks and not out.masks[m.path].any() for m in members)
    and not any(bias is not None and bias.any() for bias in biases)
  )


def _bias(path: str) -> str:
  """The path of a kernel's bias."""
  return str(Place.parse(path).bias)


def _shrink_group(out: Shrunk, group: Group) -> None:
  leaving = [out.masks[m.path] for m in _leaving(group) if m.path in out.masks]
  if not leaving or len(leaving) < len(_leaving(group)):
    return
  rows = np.any([mask.any(axis=-1) for mask in leaving], axis=0)  # [..., in]
  alive = rows.reshape(*rows.shape[:-1], -1, rows.size // group.units).any(axis=-1)  # [..., units]
  if alive.all():
    return
  if alive.ndim == 2:
    alive = _drop_experts(out, group, alive)
  most = max(int(alive.sum(axis=-1).max()), 1)
  if most == alive.shape[-1]:
    return
  units = np.sort(np.argsort(~alive, axis=-1, kind='stable')[..., :most], axis=-1)
  for member in group.members:
    for path, axis in ((member.path, member.axis), (_bias(member.path), -1)):
      if path == member.path or member.axis == -1:  # the bias of what enters belongs to its unit
        for arrays in (out.params, out.masks):
          if path in arrays:
            arrays[path] = _take(arrays[path], units, alive.shape[-1], axis)
  out.removed.append(f'{group.name}: {most} of {alive.shape[-1]} kept')


def _drop_experts(out: Shrunk, group: Group, alive: np.ndarray) -> np.ndarray:
  """Removes experts none of whose units is left; returns which units the others have."""
  biases = [out.params.get(_bias(m.path)) for m in _leaving(group)]
  empty = ~alive.any(axis=1)
  for bias in biases:
    if bias is not None:
      empty &= ~bias.any(axis=1)
  if not empty.any() or empty.all():
    return alive
  kept = np.flatnonzero(~empty).astype(np.int32)
  out.kept[group.path] = kept
  for arrays in (out.params, out.masks):
    for path in [p for p in arrays if Place.parse(p).within(Place.parse(group.path))]:
      arrays[path] = arrays[path][kept]
  out.removed.append(f'{group.path}: {len(kept)} of {len(empty)} experts kept')
  return alive[kept]


def _take(array: np.ndarray, units: np.ndarray, total: int, axis: int) -> np.ndarray:
  """The slices of those units along an axis that is made of `total` of them."""
  size = array.shape[axis] // total
  index = (units[..., None] * size + np.arange(size)).reshape(*units.shape[:-1], -1)
  if index.ndim == 1:
    return np.take(array, index, axis)
  # Of each expert its own.
  shape = [1] * array.ndim
  shape[0], shape[axis] = index.shape
  return np.take_along_axis(array, index.reshape(shape), axis)
