"""Setting up a run: its data, program and related runs, with all checks before any long work."""

import dataclasses
import functools
import json

import jax
import numpy as np
from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.data import pipeline, tokenizers
from sparse_lm.data.pipeline import Data
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.layers.threshold import THRESHOLDS
from sparse_lm.model import slots
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import arithmetic, configs, runtime
from sparse_lm.runs.build import build, check_costs
from sparse_lm.runs.trained import Trained, check_fits, inherited_tokenizer, load
from sparse_lm.runs.weight import groups_of_parts
from sparse_lm.signals import from_calibration
from sparse_lm.train import states
from sparse_lm.train.states import TrainState
from sparse_lm.train.step import Program
from sparse_lm.train.work import Meter, Work


@dataclasses.dataclass(frozen=True)
class Setup:
  """A checked config, with everything that its training needs.

  Attributes:
    config: the config, with 'auto' replaced by the precision of this device.
    data: the tokenized text and its pipelines.
    program: the model, weight method and optimizer, with their compiled steps.
    target: final density of each prunable parameter, `None` = dense.
    parent: the run that this one starts from, or `None`.
    teacher: the run that this one is distilled from, or `None`.
    kernels: names of the attention kernels, see `arithmetic.attention_kernels`.
    notes: sentences about fields of 'auto' that fall back to a slower choice on this device.
  """

  config: ConfigDict
  data: Data
  program: Program
  target: Tree
  parent: Trained | None = None
  teacher: Trained | None = None
  kernels: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  def meter(self) -> Meter:
    """Returns a counter of the FLOPs of the run's steps."""
    data = self.config.data
    teacher = self.teacher.forward_flops(data.context) if self.teacher else 0.0
    target = {path: float(density) for path, density in tree.named(self.final).items()}
    return Meter(self.program, data.batch * data.context, teacher, target)

  @property
  def final(self) -> Tree:
    """The final densities: those of the parent's masks if the run keeps them, otherwise `target`."""
    if self.parent and self.parent.is_sparse and self.program.method.traits.takes_masks:
      return self.parent.target
    return self.target

  @property
  def inherited(self) -> Work:
    """The FLOPs that the runs before this one have spent."""
    return Work(ancestors=self.parent.work.total if self.parent else 0.0)

  def start(self) -> TrainState:
    """Returns the state at step 0."""
    data = self.config.data
    if self.teacher is None and self.parent is None:
      batch = data.batch, data.context + 1
      return self.program.begin(self.config.seed, self.target, batch)
    state = self.program.init(self.config.seed, self.target)
    if self.parent is None:
      return state
    masks = self.parent.masks if self.parent.is_sparse else None
    start = states.Start(self.parent.params, masks, self.parent.model_state)
    return states.restart(
      self.program.method, self.program.optimizer, self.config.seed, state, start
    )


def setup(config: ConfigDict) -> Setup:
  """Checks a config and builds its program on this device. Raises UserError if the config is not valid.

  In the config of the result, 'auto' is replaced by the precision of this device; see
  `runs/arithmetic.py`.
  """
  asked, config = config, arithmetic.resolved(config)
  _check_accumulation(config)
  check_costs(config)
  data = data_of(config)
  program, target = build(config, data.tokenizer.vocab_size)
  _check_memory(program, data, target)
  _check_signals(config.weight, program, data)
  kernels, reasons = arithmetic.attention_kernels(program.model)
  notes = arithmetic.notes(asked, reasons)
  related = loaded(config, program, data)
  run = Setup(config, data, program, target, **related, kernels=kernels, notes=tuple(notes))
  if run.parent is not None:
    _check_masks(run.parent, program, target, config)
    _check_thresholds(run.parent, program)
  return run


def _check_signals(weight: ConfigDict, program: Program, data: Data) -> None:
  """Raises UserError for methods that need calibration text, or more batches than the text has."""
  for part, (group, fields) in groups_of_parts(weight).items():
    if signals := from_calibration(program.method.parts[part].traits.needs):
      raise UserError(
        f'{group}.name={fields.name!r} needs {", ".join(signals)}, which only '
        'pruning of a trained model computes; valid: python -m sparse_lm.prune, or another method'
      )
    asked = program.method.parts[part].batches_at_start or 0
    if asked > data.whole_batches:
      raise UserError(
        f'{group}.batches={asked} before step 0: the training split has {data.whole_batches} batches of '
        f'{data.batch} sequences; valid: up to {data.whole_batches}, or a smaller config.data.batch'
      )


def loaded(config: ConfigDict, program: Program, data: Data) -> dict[str, Trained]:
  """Loads the parent and the teacher of a run, by their attribute of `Setup`."""
  found = {}
  for role, field, path in (
    ('parent', 'config.init_from', config.init_from),
    ('teacher', 'config.distill.teacher', config.distill.teacher),
  ):
    if path:
      found[role] = load(path)
      check_fits(found[role], field, program, data.tokenizer)
  teacher = found.get('teacher')
  if teacher and teacher.program.model.spec.context < config.data.context:
    raise UserError(
      f'config.distill.teacher={teacher.workdir!r} reads {teacher.program.model.spec.context} tokens; '
      f'valid: a run with config.data.context={config.data.context} or more'
    )
  return found


def _check_masks(parent: Trained, program: Program, target: Tree, config: ConfigDict) -> None:
  if not parent.is_sparse:
    return
  for part, (group, fields) in groups_of_parts(config.weight).items():
    if not program.method.parts[part].traits.takes_masks:
      names = slots.names('weight')
      able = [name for name in names if slots.method('weight', name).traits.takes_masks]
      raise UserError(
        f'config.init_from={parent.workdir!r} is sparse, and {group}.name={fields.name!r} would lose its '
        f'masks; valid: {", ".join(map(repr, able))}'
      )
    if fields.sparsity:
      raise UserError(
        f'{group}.sparsity={fields.sparsity}: the masks are those of config.init_from='
        f'{parent.workdir!r}; valid: 0'
      )
  masks, prunable = tree.named(jax.device_get(parent.masks)), tree.named(target)
  lost = [path for path, mask in masks.items() if path not in prunable and not np.all(mask)]
  if lost:
    raise UserError(
      f'config.weight.dense={tuple(config.weight.dense)} names {lost[0]}, which config.init_from='
      f'{parent.workdir!r} has pruned; valid: the value of that run, {tuple(parent.config.weight.dense)}'
    )


def _check_thresholds(parent: Trained, program: Program) -> None:
  """Raises UserError if the model has not all thresholds that the parent's model has."""
  there = tree.named(parent.model_state.get(THRESHOLDS, {}))
  here = tree.named(plan_of(program.model).variables.get(THRESHOLDS, {}))
  if there and there.keys() != here.keys():
    saved = parent.config
    raise UserError(
      f'config.init_from={parent.workdir!r} holds calibrated thresholds, which this model lacks; valid: '
      f'config.site.name={saved.site.name!r} and config.activation.name={saved.activation.name!r} as '
      'there, or the workdir that they were calibrated from'
    )


def _check_memory(program: Program, data: Data, target: Tree) -> None:
  """Raises UserError if a step does not fit in memory, judging by shapes alone."""
  state = jax.eval_shape(program.init, 0, target).replace(key=None)
  state_bytes = tree.nbytes(state)
  tokens = data.batch // program.accumulation * data.context
  spec, room = program.model.spec, runtime.memory()
  # Every `config.model.remat` keeps the input of each layer for the backward pass.
  hidden = tokens * spec.width * (spec.layers + 1) * spec.compute.itemsize
  if state_bytes + hidden > room:
    raise UserError(
      f'config.model and config.data.batch: weights, moments, masks and averages take '
      f'{state_bytes / 2**30:,.2f} GiB and the hidden states of {tokens} tokens '
      f'{hidden / 2**30:,.2f} GiB, of {room / 2**30:,.2f} GiB of memory; valid: a smaller model, or '
      'fewer tokens in a microbatch'
    )


def data_of(config: ConfigDict, tokenizer: Tokenizer | None = None) -> Data:
  """Returns the tokenized text. It is cached, because the runs of a study share it.

  A run that starts from another run takes that run's tokenizer if the config names the same kind. A
  tokenizer that is trained again on other text would give other tokens.

  Args:
    config: the run's config.
    tokenizer: the tokenizer of a model that was loaded. It is used if its kind cannot be made from text.
  """
  if config.data.tokenizer in tokenizers.NAMES:
    tokenizer = None
  if tokenizer is None and config.init_from:
    tokenizer = inherited_tokenizer(config)
  return _load_data(json.dumps(configs.to_json(config.data)), tokenizer)


def text_of(config: ConfigDict, tokenizer: Tokenizer) -> Data:
  """Returns a text that is only evaluated, as the tokens of a given tokenizer. It is cached."""
  return _load_data(json.dumps(configs.to_json(config.data)), tokenizer, training=False)


@functools.lru_cache(maxsize=4)
def _load_data(config: str, tokenizer: Tokenizer | None, training: bool = True) -> Data:
  return pipeline.load(configs.from_json(json.loads(config)), tokenizer, training)


def _check_accumulation(config: ConfigDict) -> None:
  if config.data.batch % config.train.accumulation:
    raise UserError(
      f"config.train.accumulation={config.train.accumulation} doesn't divide "
      f'config.data.batch={config.data.batch}'
    )
