"""Removes neurons, heads, experts and layers that masks have dropped as a whole.

Works on arrays by path. A unit is removed if all of its output weights (its rows of the down-projection
or output projection) are dropped, because nothing then depends on it, whatever other weights it has.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from sparse_lm.core.groups import Group, Member
from sparse_lm.core.paths import Place

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Shrunk:
  """A model without the removed units.

  Attributes:
    params: parameters by path.
    masks: bool masks by path; parameters without a mask are dense.
    kept: int32 indices of the kept experts, by the path of their module, if experts were removed.
    removed_layers: numbers of the removed layers.
    removed: one line of text for each group that lost units.
  """

  params: Arrays
  masks: Arrays
  kept: Arrays
  removed_layers: tuple[int, ...]
  removed: list[str]


def shrink(params: Arrays, masks: Arrays, groups: Iterable[Group], closed: Iterable[int]) -> Shrunk:
  """Removes dead units, and the layers in `closed`, which never run."""
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
  """Returns the members with the output weights of the units."""
  return [member for member in group.members if member.axis == -2]


def _adds_nothing(out: Shrunk, groups: Iterable[Group], layer: int) -> bool:
  members = [m for g in groups if Place.parse(g.path).layer == layer for m in _leaving(g)]
  biases = [out.params.get(_bias(m.path)) for m in members]
  return (
    len(members) >= 2  # one of attention and one of the MLP
    and all(m.path in out.masks and not out.masks[m.path].any() for m in members)
    and not any(bias is not None and bias.any() for bias in biases)
  )


def _bias(path: str) -> str:
  """Returns the path of a kernel's bias."""
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
      if path == member.path or member.axis == -1:  # input biases belong to the units, too
        for arrays in (out.params, out.masks):
          if path in arrays:
            arrays[path] = _take(arrays[path], units, alive.shape[-1], axis)
  out.removed.append(f'{group.name}: {most} of {alive.shape[-1]} kept')


def _drop_experts(out: Shrunk, group: Group, alive: np.ndarray) -> np.ndarray:
  """Removes experts without live units; returns the live units of the other experts."""
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
  """Returns the slices of some units along an axis that consists of `total` units."""
  size = array.shape[axis] // total
  index = (units[..., None] * size + np.arange(size)).reshape(*units.shape[:-1], -1)
  if index.ndim == 1:
    return np.take(array, index, axis)
  # Each expert keeps its own units.
  shape = [1] * array.ndim
  shape[0], shape[axis] = index.shape
  return np.take_along_axis(array, index.reshape(shape), axis)
