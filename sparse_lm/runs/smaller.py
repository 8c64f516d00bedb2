"""Makes a trained model smaller: fewer layers, hidden units, heads, channels or experts.

Their importances, measured on calibration text, decide which ones stay (`train/importance.py`).

The result is a workdir of a dense model with a smaller `config.model`. It trains, evaluates, decodes and
converts like any other.
"""

import pathlib
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, require, unknown
from sparse_lm.core.paths import Place
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.model import lm
from sparse_lm.model.lm import LM
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import configs
from sparse_lm.runs.configs import Overrides
from sparse_lm.runs.environment import environment
from sparse_lm.runs.prune_files import (
  TOGETHER,
  Source,
  calibration_text,
  check_no_thresholds,
  check_unpruned,
  opened,
)
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS, with_format
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import check_new, whole_folder, write_json
from sparse_lm.train import importance, one_shot
from sparse_lm.train.importance import HEAD, NEURON, Importances
from sparse_lm.train.work import Work

LAYERS, WIDTH, HIDDEN, HEADS = ('layers', 'width', 'hidden', 'heads')
EXPERTS = 'experts'
SIZES = (LAYERS, WIDTH, HIDDEN, HEADS, EXPERTS)
# Some axes of each parameter, by its path.
Axes = Mapping[str, tuple[int, ...]]


def parse(text: str) -> dict[str, int]:
  """Returns the sizes that `--shrink` gives, such as `{'layers': 22, 'hidden': 1024}`.

  Raises UserError if it is not a list of such pairs.
  """
  found = {}
  for entry in text.split(','):
    match = re.fullmatch(r'\s*(\w+):(\d{1,9})\s*', entry)
    if not match or match[1] in found:
      raise UserError(f'--shrink={text!r} is not valid; valid: for example layers:22,hidden:1024')
    if match[1] not in SIZES:
      raise unknown('--shrink', match[1], SIZES)
    found[match[1]] = int(match[2])
  return found


def shrink(
  parent: str,
  out: str,
  sizes: Mapping[str, int],
  text: Overrides,
  segments: int = 128,
  context: int | None = None,
) -> JsonObject:
  """Keeps the most important units of a trained model and writes the smaller model as a new workdir.

  Layers are ranked by block influence (ShortGPT, Men et al. 2024), other units by the norms of their
  activations (Minitron, Muralidharan et al. 2024), and experts by the norms of their weighted outputs
  (REAP, Lasby et al. 2025). A key head is kept together with the query heads that share it.

  Args:
    parent: a workdir with weight files.
    out: the new workdir.
    sizes: new sizes by the names in `SIZES`, which are fields of `config.model` and `config.mlp.experts`.
    text: fields of `config.data` that name the calibration text.
    segments: number of calibration sequences.
    context: tokens of a sequence; by default the model's context, but at most 2048.

  Returns the contents of result.json. Raises UserError for invalid input, before anything is written.
  """
  check_new(out, '--out')
  source = opened(parent)
  _check_dense(source.files, parent)
  model = lm.from_config(source.config, source.tokenizer.vocab_size)
  smaller = _Smaller.of(source.config, model, sizes)
  read = calibration_text(
    source.config, text, source.tokenizer, model.spec.context, segments, context
  )
  begin = time.perf_counter()
  batches = one_shot.in_batches(read.tokens_NxL, max(1, TOGETHER // read.tokens_NxL.shape[1]))
  parts = source.parts(plan_of(model).params)
  found = importance.importances(
    model, parts, batches, smaller.reads_width(model), EXPERTS in sizes
  )
  kept = smaller.chosen(found)
  after, before = smaller.counts
  numbers = {
    'params': after,
    'parent_params': before,
    'segments': segments,
    'shrink_seconds': time.perf_counter() - begin,
  }
  result = {
    'config': configs.to_json(smaller.config),
    'env': environment(),
    'calibration': read.card,
    'metrics': {'steps': source.files.step, **numbers},
    'parent': parent,
    'pruned_from': source.files.source,
    'sizes': dict(sizes),
    'layers': kept.layers.tolist(),
    'influence': found.influence_L.tolist(),
  }
  with whole_folder(out) as path:
    _write(path, source, smaller, kept, result)
  return result


class _Kept(NamedTuple):
  """Ascending indices of the kept layers, channels, units (by group) and experts (by layer)."""

  layers: np.ndarray
  width: np.ndarray
  units: dict[str, np.ndarray]
  experts: list[np.ndarray]


class _Smaller(NamedTuple):
  """A smaller model.

  Attributes:
    config: its config.
    model: the smaller model.
    whole: the model before shrinking.
    axes: for each given size except the number of layers, the axes of parameters that change with it.
  """

  config: ConfigDict
  model: LM
  whole: LM
  axes: dict[str, Axes]

  @classmethod
  def of(cls, config: ConfigDict, model: LM, sizes: Mapping[str, int]) -> '_Smaller':
    """Returns the smaller model. Raises UserError for sizes that the model cannot have."""
    spec, vocab = model.spec, model.spec.vocab
    now = {LAYERS: spec.layers, WIDTH: spec.width, HIDDEN: spec.hidden, HEADS: spec.heads}
    now[EXPERTS] = config.mlp.get(EXPERTS, 0)
    require(
      EXPERTS not in sizes or now[EXPERTS] > 0,
      f'--shrink={EXPERTS}',
      sizes.get(EXPERTS),
      f'a model with experts, or sizes among {", ".join(SIZES[:-1])}',
    )
    shared = spec.heads // spec.kv_heads
    for name, size in sizes.items():
      step = shared if name == HEADS else 1
      valid = f'{step} to {now[name]}' + (f', a multiple of {step}' if step > 1 else '')
      require(step <= size <= now[name] and size % step == 0, f'--shrink={name}', size, valid)
    # Sizes that follow from other sizes by default keep their present values.
    own = {'model.head_width': spec.head_dim, 'model.hidden': spec.hidden}
    own |= {'model.heads': spec.heads, 'model.kv_heads': spec.kv_heads}
    group = {EXPERTS: 'mlp'}
    changes = {name: {f'{group.get(name, "model")}.{name}': size} for name, size in sizes.items()}
    if HEADS in sizes:
      changes[HEADS]['model.kv_heads'] = sizes[HEADS] // shared
    axes = {}
    for name in changes:
      one = configs.derive(config, own | changes[name], allowed=('model', 'mlp'))
      if name != LAYERS:
        axes[name] = _changed(model, lm.from_config(one, vocab))
        stacked = any(len(plan_of(model).shapes[path].shape) > 2 for path in axes[name])
        if sizes[name] < now[name] and (not axes[name] or (stacked and name == HIDDEN)):
          raise UserError(
            f'--shrink={name}:{sizes[name]}: the MLPs of this model are experts, or have another size; '
            'valid: other sizes'
          )
      elif (
        len({tuple(slot.at(i, spec.layers) for slot in model.slots) for i in range(spec.layers)})
        > 1
      ):
        raise UserError(
          f'--shrink={name}:{sizes[name]}: the layers of this model have different methods; valid: a '
          'model of equal layers, or other sizes'
        )
    every = own | {field: value for change in changes.values() for field, value in change.items()}
    final = configs.derive(config, every, allowed=('model', 'mlp'))
    return cls(final, lm.from_config(final, vocab), model, axes)

  @property
  def counts(self) -> tuple[int, int]:
    """The numbers of parameters of the smaller and of the whole model."""
    small, whole = (plan_of(model).shapes.values() for model in (self.model, self.whole))
    return sum(leaf.size for leaf in small), sum(leaf.size for leaf in whole)

  def reads_width(self, model: LM) -> set[str]:
    """Returns the paths of the kernels whose inputs are the channels of the residual stream."""
    width, layers = model.spec.width, model.spec.layers
    shapes = []
    for one in (width, width + 2):
      sizes = {'model.width': one, 'model.layers': layers}
      config = configs.derive(self.config, sizes, allowed=('model', 'mlp'))
      shapes.append(lm.from_config(config, model.spec.vocab))
    return {path for path, axes in _changed(*shapes).items() if axes == (0,)}

  def chosen(self, found: Importances) -> _Kept:
    """Returns the units of largest importance."""
    spec = self.model.spec
    counts = {NEURON: spec.hidden, HEAD: spec.kv_heads}
    kinds = {group.name: group.kind for group in plan_of(self.whole).units}
    units = {
      name: importance.largest(scores, counts[kinds[name]]) for name, scores in found.units.items()
    }
    return _Kept(
      importance.largest(found.influence_L, spec.layers),
      importance.largest(found.width_D, spec.width),
      units,
      [importance.largest(scores, self.config.mlp[EXPERTS]) for scores in found.experts],
    )

  def cut(self, path: str, leaf: np.ndarray, kept: _Kept) -> np.ndarray:
    """Returns the kept slices of the parameter at `path` of the whole model."""
    plan, spec, place = plan_of(self.whole), self.whole.spec, Place.parse(path)
    own = {group.kind: group for group in plan.units if place.within(Place.parse(group.path))}
    for name, kind in ((WIDTH, ''), (HIDDEN, NEURON), (HEADS, HEAD)):
      for axis in self.axes.get(name, {}).get(path, ()):
        group = own.get(kind)
        index = kept.width if group is None else kept.units[group.name]
        total = spec.width if group is None else group.units
        leaf = importance.sliced(leaf, {axis: index}, {axis: total})
    for axis in self.axes.get(EXPERTS, {}).get(path, ()):
      leaf = np.take(leaf, kept.experts[place.layer], axis)
    return leaf


def _changed(one: LM, other: LM) -> Axes:
  """Returns the axes of each parameter that differ in size between two models, by path."""
  shapes = [plan_of(model).shapes for model in (one, other)]
  found = {}
  for path, leaf in shapes[0].items():
    pairs = zip(leaf.shape, shapes[1][path].shape, strict=True)
    if axes := tuple(axis for axis, (a, b) in enumerate(pairs) if a != b):
      found[path] = axes
  return found


def _check_dense(files: WeightFiles, parent: str) -> None:
  """Raises UserError if the model has masks or thresholds, which fit only its present matrices."""
  check_no_thresholds(files.model_state, parent)
  check_unpruned(files, parent, 'a dense one (shrink it first, and prune then)')


def _write(
  path: pathlib.Path, source: Source, smaller: _Smaller, kept: _Kept, result: JsonObject
) -> None:
  """Writes the workdir of the smaller model."""
  files = source.files
  child = WeightFiles(path / WEIGHTS, len(kept.layers))

  def cut(part: int | None) -> Tree:
    return tree.map_named(lambda name, leaf: smaller.cut(name, leaf, kept), files.read(part)[0])

  nothing = lambda params: tree.map_named(lambda *_: None, params)  # noqa: E731
  outside = cut(None)
  child.write(None, outside, nothing(outside))
  for new, old in enumerate(kept.layers.tolist()):
    params = importance.renamed(cut(old), new)
    child.write(new, params, nothing(params))
  child.finish(f'{files.source}, shrunk', files.step, Work(ancestors=files.work.total))
  write_json(path / 'env.json', environment())
  write_json(path / 'tokenizer.json', source.tokenizer.to_json())
  write_json(path / CONFIG, with_format(result['config']))
  write_json(path / 'result.json', result)
