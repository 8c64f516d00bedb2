"""One-shot pruning of a workdir with weight files: one layer in memory at a time, resumable.

The new workdir is complete when its `pruning.json` is gone. Until then, the same command continues it.
"""

import dataclasses
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, require, writing
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.data import tokenizers
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.layers.threshold import THRESHOLDS
from sparse_lm.model import lm
from sparse_lm.model.lm import LM
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import configs, digests, lock, measured
from sparse_lm.runs.build import build
from sparse_lm.runs.configs import Overrides
from sparse_lm.runs.environment import environment
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS, folder_of, read_config, with_format
from sparse_lm.runs.runnable import OTHER_TEXT
from sparse_lm.runs.setup import text_of
from sparse_lm.runs.weight import check_one_shot, groups_of_parts
from sparse_lm.runs.weight_files import INDEX, WeightFiles
from sparse_lm.runs.workdir import check_new, read_json, write_json
from sparse_lm.signals import from_calibration
from sparse_lm.train import layerwise, one_shot
from sparse_lm.train.layerwise import of_part
from sparse_lm.train.one_shot import Pruning
from sparse_lm.train.step import Program
from sparse_lm.train.work import Work

PLAN = 'pruning.json'
TOGETHER = 2048  # tokens that run together
# The default of `context` in tokens for models with a longer context, as in SparseGPT and Wanda.
LONGEST = 2048


class Text(NamedTuple):
  """Calibration sequences, int32 `[N, L]`, and the card of their text, `None` if no text is read."""

  tokens_NxL: np.ndarray
  card: JsonObject | None


class Source(NamedTuple):
  """A workdir with weight files: its config, its tokenizer and its weights."""

  config: ConfigDict
  tokenizer: Tokenizer
  files: WeightFiles

  def parts(self, like: Tree) -> 'Files':
    """Returns the weights for reading, in the dtypes of `like`, a tree like the parameters."""
    return Files(self.files, self.files, like)


@dataclasses.dataclass(frozen=True)
class Files:
  """The parts of a model: read from one folder of weight files, and written to another."""

  parent: WeightFiles
  child: WeightFiles
  like: Tree

  def read(self, part: int | None) -> tuple[Tree, Tree]:
    """Returns the unpruned parameters of a part, and no masks."""
    return self._as_model(part, self.parent.read(part)[0]), {}

  def pruned(self, part: int | None) -> Tree | None:
    """Returns the parameters of a part that is written already, or `None`."""
    if part in self.child.missing():
      return None
    return self._as_model(part, self.child.read(part)[0])

  def write(self, part: int | None, params: Tree, masks: Tree) -> None:
    """Writes the file of a part."""
    self.child.write(part, params, masks)

  def _as_model(self, part: int | None, params: Tree) -> Tree:
    cast = lambda like, leaf: jnp.asarray(leaf, like.dtype)  # noqa: E731
    return jax.tree.map(cast, of_part(self.like, part), params)


def prune_files(
  parent: str, out: str, overrides: Overrides, segments: int, context: int | None = None
) -> JsonObject:
  """Prunes a workdir with weight files in one shot and writes the result as a new workdir.

  If a process was killed, the same call continues with the first layer that is not yet written.

  Args:
    parent: a workdir with the folder `weights/`.
    out: the new workdir.
    overrides: values of `config.weight` and, for the calibration text, of `OTHER_TEXT`, by dotted name.
    segments: number of calibration sequences, from the training split of the text.
    context: tokens of a sequence; by default the model's context, but at most `LONGEST`.

  Returns:
    The contents of result.json.

  Raises:
    UserError: invalid input, before anything is written.
  """
  config, tokenizer, source = opened(parent)
  check_no_thresholds(source.model_state, parent)
  check_unpruned(source, parent, 'the dense model that it was pruned from')
  text = {field: value for field, value in overrides.items() if field in OTHER_TEXT}
  asked = configs.derive(
    config, {f: value for f, value in overrides.items() if f not in text}, allowed=('weight',)
  )
  program, target = build(measured.uniform(asked), tokenizer.vocab_size)
  check_one_shot(program.method, asked.weight)
  one_shot.check_layerwise(program.method)
  measured.check(asked, program, target)
  Pruning(program.model, program.method, target, {}, [], asked.seed).check_reached()
  most = program.model.spec.context
  needs = [from_calibration(part.traits.needs) for part in program.method.parts.values()]
  if any(needs) or measured.asked(asked):
    read = calibration_text(config, text, tokenizer, most, segments, context)
  else:
    read = Text(np.zeros((0, most), np.int32), None)
  plan = {
    'config': configs.to_json(asked),
    'parent': digests.of_json(read_json(source.folder / INDEX)),
    'calibration': digests.of_json(read.tokens_NxL.tolist()),
  }
  path = pathlib.Path(out).expanduser()
  _check_out(path, out, plan)
  with writing(path):
    path.mkdir(parents=True, exist_ok=True)
  with lock.held(path / 'lock', f'workdir {out}'):
    begin = time.perf_counter()
    final = _prune(path, plan, asked, program, target, source, read)
    numbers = {'prune_seconds': time.perf_counter() - begin, 'segments': len(read.tokens_NxL)}
    return _finish(path, parent, asked, final, source, tokenizer, read, program, numbers)


def opened(parent: str) -> Source:
  """Opens a workdir with weight files, without reading the weights.

  Raises UserError if the folder holds no such model, or if its files do not fit its config.
  """
  folder = folder_of(parent)[0]
  config = configs.of_run(read_config(folder), folder / CONFIG)
  tokenizer = tokenizers.from_json(read_json(folder / 'tokenizer.json'))
  if not (folder / WEIGHTS).is_dir():
    raise UserError(
      f'--workdir={parent} holds no folder {WEIGHTS}; valid: an imported model, which convert wrote'
    )
  files = WeightFiles(folder / WEIGHTS)
  _check_shapes(files, lm.from_config(config, tokenizer.vocab_size), folder)
  return Source(config, tokenizer, files)


def check_no_thresholds(model_state: Tree, parent: str) -> None:
  """Raises UserError if the model has calibrated thresholds, which fit only its present weights."""
  if THRESHOLDS in model_state:
    raise UserError(
      f'--workdir={parent} holds calibrated thresholds, which are those of its weights; valid: the '
      'workdir that they were calibrated from (change the weights first, and calibrate then)'
    )


def check_unpruned(files: WeightFiles, parent: str, valid: str) -> None:
  """Raises UserError if the model has masks; `valid` is the end of the message."""
  if any(':' in name for file in files.index['files'].values() for name in file['shapes']):
    raise UserError(f'--workdir={parent} holds a pruned model; valid: {valid}')


def calibration_text(
  config: ConfigDict,
  text: Overrides,
  tokenizer: Tokenizer,
  most: int,
  segments: int,
  context: int | None,
) -> Text:
  """Returns calibration sequences from the training split of a text.

  Args:
    config: the model's config, which may name a text.
    text: fields of `config.data` that name another text.
    tokenizer: the model's tokenizer.
    most: the model's context in tokens.
    segments: number of sequences.
    context: tokens of a sequence; by default `most`, but at most `LONGEST`.

  Raises UserError if the text cannot be read or is too short.
  """
  length = min(most, LONGEST) if context is None else context
  require(1 <= length <= most, '--context', length, f'1 to {most}, the positions of the model')
  files = {'data.source': 'files'} if 'data.path' in text else {}
  data = text_of(configs.derive(config, files | dict(text), allowed=('data',)), tokenizer)
  return Text(layerwise.calibration(data.tokens['train'], segments, length, config.seed), data.card)


def _check_shapes(source: WeightFiles, model: LM, folder: pathlib.Path) -> None:
  """Raises UserError if the parameters of the files are not those of the config."""
  there = {}
  for file in source.index['files'].values():
    there |= {name: tuple(shape) for name, shape in file['shapes'].items()}
  for path, leaf in plan_of(model).shapes.items():
    if there.get(path) != leaf.shape:
      raise UserError(
        f'{source.folder} does not fit {folder / CONFIG}: {path} is {there.get(path, "missing")} there '
        f'and {leaf.shape} in the model of this config; valid: the folder as convert or prune wrote it'
      )


def _check_out(path: pathlib.Path, out: str, plan: JsonObject) -> None:
  """Raises UserError unless `out` is a new folder, or an unfinished one of the same command."""
  if not (path / PLAN).exists():
    check_new(out, '--out')
    return
  found = read_json(path / PLAN)
  old, new = (configs.flat(values['config']) for values in (found, plan))
  for field in sorted({*old, *new}, key=lambda name: (not name.endswith('name'), name)):
    if old.get(field) != new.get(field):
      raise UserError(
        f'--out={out} holds an unfinished pruning with config.{field}={old.get(field)!r}, not '
        f'{new.get(field)!r}; valid: that value, or a new folder'
      )
  for key, what in (('parent', 'of other weights'), ('calibration', 'on other calibration text')):
    if found.get(key) != plan[key]:
      raise UserError(
        f'--out={out} holds an unfinished pruning {what}; valid: the same --workdir, --segments, '
        '--context and text, or a new folder'
      )


def _prune(
  path: pathlib.Path,
  plan: JsonObject,
  asked: ConfigDict,
  program: Program,
  target: Tree,
  source: WeightFiles,
  read: Text,
) -> ConfigDict:
  """Prunes the parts that are not yet written; returns the config of the pruned model."""
  child = WeightFiles(path / WEIGHTS, program.model.spec.layers)
  files = Files(source, child, plan_of(program.model).params)
  batch = max(1, TOGETHER // read.tokens_NxL.shape[1])
  batches = one_shot.in_batches(read.tokens_NxL, batch)
  final = read_json(path / PLAN).get('final') if (path / PLAN).exists() else None
  if final is None:
    write_json(path / PLAN, plan)
    config = asked
    if measured.asked(asked):
      config = measured.as_maps(asked, program, target, files, {}, batches)
    write_json(path / PLAN, plan | {'final': configs.to_json(config)})
  else:
    config = configs.from_json(final)
  program, target = build(config, program.model.spec.vocab)
  method = program.method
  run = Pruning(program.model, method, target, {}, batches, config.seed)
  if child.missing():
    run.prune_layers(files, tuple(method.parts), {name: {} for name in method.parts})
  return config


def _finish(
  path: pathlib.Path,
  parent: str,
  asked: ConfigDict,
  config: ConfigDict,
  source: WeightFiles,
  tokenizer: Tokenizer,
  read: Text,
  program: Program,
  numbers: JsonObject,
) -> JsonObject:
  """Writes all files but the weights, and removes the plan; returns the contents of result.json."""
  child = WeightFiles(path / WEIGHTS, source.layers)
  methods = ', '.join(fields.name for _, fields in groups_of_parts(config.weight).values())
  child.finish(
    f'{source.source}, pruned by {methods}', source.step, Work(ancestors=source.work.total)
  )
  groups = groups_of_parts(asked.weight).values()
  result = {
    'config': configs.to_json(config),
    'env': environment(),
    'calibration': read.card,
    'causal': lm.causal(program.model),
    'metrics': {'steps': source.step, 'sparsity_prunable': _sparsity(child), **numbers},
    'parent': parent,
    'pruned_from': source.source,
    'distribution': {group: fields.distribution for group, fields in groups},
  }
  write_json(path / 'env.json', environment())
  write_json(path / 'tokenizer.json', tokenizer.to_json())
  write_json(path / CONFIG, with_format(configs.to_json(config)))
  write_json(path / 'result.json', result)
  (path / PLAN).unlink()
  return result


def _sparsity(files: WeightFiles) -> float:
  """Returns the fraction of dropped weights among all weights that have a mask."""
  kept = total = 0
  for part in files.parts:
    for mask in tree.named(files.read(part)[1]).values():
      kept, total = kept + int(mask.sum()), total + mask.size
  return 1 - kept / max(total, 1)
