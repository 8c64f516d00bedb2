"""Distributions that are measured on a trained model, and become maps in the config of the pruned run."""

import math

import numpy as np
from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.distribution import Outliers, as_map
from sparse_lm.core.paths import Part, Place
from sparse_lm.core.tree import Tree
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import configs
from sparse_lm.runs.build import build
from sparse_lm.runs.weight import groups_of_parts
from sparse_lm.train import outliers
from sparse_lm.train.layerwise import Parts
from sparse_lm.train.step import Program
from sparse_lm.weights import parts as method_parts


def asked(config: ConfigDict) -> dict[str, Outliers]:
  """Returns the measured distribution of each part of the weight method that has one."""
  found = {
    name: Outliers.parse(fields.distribution)
    for name, (_, fields) in groups_of_parts(config.weight).items()
  }
  return {name: one for name, one in found.items() if one}


def uniform(config: ConfigDict) -> ConfigDict:
  """Returns the config with uniform distributions in place of measured ones."""
  return _with(config, dict.fromkeys(asked(config), 'uniform'))


def check(config: ConfigDict, program: Program, target: Tree) -> None:
  """Raises UserError if a pattern cannot express the densities of a measured distribution, or if no
  outliers can be measured in a matrix.

  Args:
    config: the config with measured distributions.
    program, target: the results of `build` for `uniform(config)`.
  """
  trials = {}
  for name, one in asked(config).items():
    outliers.check_reached(program.model, method_parts.own(program.method, name, target))
    sizes = _sizes(program, target, name)
    trials[name] = as_map(one.trial(sizes, 1 - _sparsity(config, name)))
  build(_with(config, trials), program.model.spec.vocab)


def as_maps(
  config: ConfigDict,
  program: Program,
  target: Tree,
  parts: Parts,
  model_state: Tree,
  batches: list[np.ndarray],
) -> ConfigDict:
  """Returns the config with maps in place of measured distributions.

  Args:
    config: the config with measured distributions.
    program, target: the results of `build` for `uniform(config)`.
    parts: the weights of the trained model.
    model_state: its other collections.
    batches: calibration tokens, int32 `[B, L]` each.
  """
  rules = asked(config)
  own = {name: method_parts.own(program.method, name, target) for name in rules}
  multiples = {name: one.multiple for name, one in rules.items()}
  found = outliers.fractions(program.model, parts, model_state, own, multiples, batches)
  maps = {}
  for name, one in rules.items():
    density = 1 - _sparsity(config, name)
    maps[name] = as_map(one.densities(found[name], _sizes(program, target, name), density))
  return _with(config, maps)


def _sizes(program: Program, target: Tree, name: str) -> dict[str, int]:
  """Returns the number of prunable weights of a part of the weight method in each block."""
  shapes = plan_of(program.model).shapes
  found: dict[str, int] = {}
  for path in tree.named(method_parts.own(program.method, name, target)):
    layer = Place.parse(path).layer
    if layer is not None:
      block = Part.BLOCK.of(layer)
      found[block] = found.get(block, 0) + math.prod(shapes[path].shape)
  return found


def _sparsity(config: ConfigDict, name: str) -> float:
  return groups_of_parts(config.weight)[name][1].sparsity


def _with(config: ConfigDict, distributions: dict[str, str]) -> ConfigDict:
  groups = {name: group for name, (group, _) in groups_of_parts(config.weight).items()}
  values = {
    f'{groups[name].removeprefix("config.")}.distribution': value
    for name, value in distributions.items()
  }
  return configs.derive(config, values, allowed=('weight',)) if values else config
