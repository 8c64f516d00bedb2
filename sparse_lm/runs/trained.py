"""The model of a trained run, for evaluation, as a starting point of other runs, and as a teacher."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped
from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.data import tokenizers
from sparse_lm.kernels.cross_entropy import Readout
from sparse_lm.layers.spec import Spec
from sparse_lm.model import plans
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost
from sparse_lm.runs import best, configs, cost_report
from sparse_lm.runs.build import build
from sparse_lm.runs.checkpoint import EVALUATED, Checkpoints
from sparse_lm.runs.run_folder import (
  BEST,
  CHECKPOINTS,
  CONFIG,
  WEIGHTS,
  folder_of,
  read_config,
)
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import read_json
from sparse_lm.train.states import TrainState
from sparse_lm.train.step import Program
from sparse_lm.train.work import Work
from sparse_lm.weights.method import densities


@dataclasses.dataclass(frozen=True, repr=False)
class Trained:
  """The model of a workdir's newest intact checkpoint, of its best checkpoint, or of its weight files.

  Attributes:
    workdir: the path that was loaded, a run's folder or its `best/`.
    source: the folder and the checkpoint, in words.
    config: the run's config.
    program: the run's program.
    tokenizer: the run's tokenizer.
    target: final densities of the prunable parameters, `None` = dense.
    params: parameters, with exact zeros for dropped weights.
    masks: bool masks, a tree like `params`, `None` = dense.
    model_state: the model's other collections.
    step: optimizer steps that the checkpoint had completed.
    work: FLOPs that training had spent.
  """

  workdir: str
  source: str
  config: ConfigDict
  program: Program
  tokenizer: tokenizers.Tokenizer
  target: Tree
  params: Tree
  masks: Tree
  model_state: Tree
  step: int
  work: Work

  @property
  def folder(self) -> pathlib.Path:
    """The run's folder, also if `workdir` is `<folder>/best`."""
    return folder_of(self.workdir)[0]

  @property
  def _variables(self) -> Tree:
    return {'params': self.params, **self.model_state}

  @functools.cached_property
  def _apply(self) -> Wrapped:
    return jax.jit(functools.partial(self.program.model.apply, mode='eval'))

  @functools.cached_property
  def _readout(self) -> Wrapped:
    return jax.jit(functools.partial(self.program.model.apply, mode='eval', readout=True))

  def __repr__(self) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    return f'Trained({self.workdir!r}, step {self.step}, {count:,} parameters, {self.tokenizer})'

  def logits(self, tokens_BxL: np.ndarray) -> jax.Array:
    """Returns logits, float32 `[B, L, V]`, for token ids, int32 `[B, L]`.

    Raises UserError for an array of another shape or type, for more than `config.data.context` tokens,
    and for ids outside the vocabulary.
    """
    check_tokens(tokens_BxL, self.program.model.spec)
    return self._apply(self._variables, tokens_BxL)

  def readout(self, tokens_BxL: np.ndarray | jax.Array) -> Readout | jax.Array:
    """Returns the inputs of the loss: a `Readout`, or logits if the head does not support one.

    The tokens are not checked, because reading them would wait for the device.

    Args:
      tokens_BxL: token ids of a training batch.
    """
    return self._readout(self._variables, tokens_BxL)

  def costs(self) -> dict[str, float]:
    """Returns sizes and FLOPs beside those of the dense twin; see `runs/cost_report.py`.

    Gates are charged as the config plans them. The workdir's result.json holds the costs at the fraction
    of open gates that was measured on the validation text.
    """
    work = self.work.over(cost_report.tokens(self.config, self.step))
    return cost_report.report(self.program, self.target, self.masks, work=work)

  def forward_flops(self, length: int) -> float:
    """Returns the FLOPs per token of a forward pass over `length` tokens, with all gates open."""
    kept = tree.named(jax.device_get(densities(self.masks)))
    ledger = cost.ungated(plans.ledger(self.program.model, length))
    return cost.forward_flops(ledger, {path: float(d) for path, d in kept.items()})

  @property
  def is_sparse(self) -> bool:
    """True if any weight was dropped."""
    masks = tree.named(jax.device_get(self.masks))
    return not all(np.all(mask) for mask in masks.values())


def check_tokens(tokens: np.ndarray | jax.Array, spec: Spec) -> None:
  """Raises UserError unless `tokens` are ids `[B, L]` of the vocabulary with 1 <= L <= context."""
  shape = np.shape(tokens)
  dtype = tokens.dtype if isinstance(tokens, np.ndarray | jax.Array) else None
  if len(shape) != 2 or dtype is None or not np.issubdtype(dtype, np.integer):
    raise UserError(
      f'tokens have shape {shape} and type {dtype or type(tokens).__name__}; valid: an integer array '
      '[sequences, tokens], such as tokenizer.encode(text)[None]'
    )
  if not 1 <= shape[1] <= spec.context:
    raise UserError(f'a sequence has {shape[1]} tokens; valid: 1 to {spec.context}, the context')
  if not shape[0]:
    raise UserError(f'tokens have shape {shape}; valid: at least one sequence')
  if not 0 <= np.min(tokens) <= np.max(tokens) < spec.vocab:
    raise UserError(
      f'token ids range from {np.min(tokens)} to {np.max(tokens)}; valid: 0 to {spec.vocab - 1}, the '
      'vocabulary'
    )


def load(workdir: str) -> Trained:
  """Loads the model of a workdir, without the state of its optimizer.

  Args:
    workdir: a run's folder (its newest intact checkpoint, or its weight files), or `<workdir>/best` (the
      checkpoint of lowest validation loss).

  Raises:
    UserError: the folder holds no run, a packed model, or no intact checkpoint or weight files, or its
      config or tokenizer was changed since the weights were saved.
  """
  folder, kind = folder_of(workdir)
  if (folder / 'packed.json').exists():
    raise UserError(
      f'workdir {workdir} holds a packed model; valid: the workdir of a run, or sparse_lm.load, which '
      'takes both'
    )
  if not (folder / CONFIG).exists():
    missing = f'no {CONFIG}' if folder.is_dir() else 'there is no such folder'
    valid = 'a folder that train, prune, pack or convert wrote'
    raise UserError(f'workdir {workdir or "."} holds no run ({missing}); valid: {valid}')
  config = configs.of_run(read_config(folder), folder / CONFIG)
  tokenizer = tokenizers.from_json(read_json(folder / 'tokenizer.json'))
  program, target = build(config, tokenizer.vocab_size)
  if kind == CHECKPOINTS and (folder / WEIGHTS).is_dir():
    found = _from_files(folder, program)
  else:
    found = _from_checkpoint(workdir, program, jax.eval_shape(program.init, config.seed, target))
  return Trained(
    workdir=workdir, config=config, program=program, tokenizer=tokenizer, **found._asdict()
  )


class _Found(NamedTuple):
  """The attributes of `Trained` that are read from the weights' folder."""

  source: str
  target: Tree
  params: Tree
  masks: Tree
  model_state: Tree
  step: int
  work: Work


def _from_checkpoint(workdir: str, program: Program, template: TrainState) -> _Found:
  """Reads the newest intact checkpoint, or the best one from `<workdir>/best`."""
  folder, kind = folder_of(workdir)
  if not (folder / kind).is_dir():
    raise _no_checkpoint(workdir)
  checkpoints = Checkpoints(folder, kind)
  try:
    state = checkpoints.restore(template, items=EVALUATED)
    work = Work() if state is None else checkpoints.work(int(state.step))
  finally:
    checkpoints.close()
  if state is None:
    raise _no_checkpoint(workdir)
  params, masks = program.finalize(state.replace(opt_state=None))
  step, target = int(state.step), state.sparse.target
  return _Found(_source(folder, kind, step), target, params, masks, state.model_state, step, work)


def _from_files(folder: pathlib.Path, program: Program) -> _Found:
  """Reads the folder `weights/`.

  Raises UserError if a file is damaged, or if the parameters are not those of the config.
  """
  files, model = WeightFiles(folder / WEIGHTS), plan_of(program.model).params
  params, masks = files.read_all()
  there, here = tree.named(params), tree.named(model)
  for path in sorted({*there, *here}):
    shapes = [str(found[path].shape) if path in found else 'missing' for found in (there, here)]
    if shapes[0] != shapes[1]:
      raise UserError(
        f'{files.folder} does not fit {folder / CONFIG}: {path} is {shapes[0]} there and {shapes[1]} in '
        'the model of this config; valid: the folder as convert or prune wrote it'
      )
  params = jax.tree.map(lambda like, leaf: jnp.asarray(leaf, like.dtype), model, params)
  masks = jax.tree.map(jnp.asarray, masks)
  source = f'{folder}: {files.source}'
  state = jax.tree.map(jnp.asarray, files.model_state)
  return _Found(source, densities(masks), params, masks, state, files.step, files.work)


def _no_checkpoint(workdir: str) -> UserError:
  valid = 'a run that has saved one, or all files of a packed folder'
  return UserError(f'workdir {workdir} has no checkpoint yet; valid: {valid}')


def _source(folder: pathlib.Path, kind: str, step: int) -> str:
  if kind == BEST:
    return f'{folder}: the checkpoint of lowest validation loss, step {step}'
  lowest = best.step_in(folder)
  hint = f' (that of lowest validation loss, step {lowest}, is {folder / BEST})'
  return f'{folder}: the newest checkpoint, step {step}{"" if lowest in (None, step) else hint}'


def inherited_tokenizer(config: ConfigDict) -> tokenizers.Tokenizer | None:
  """Returns the tokenizer of the run that `config` starts from, if both name the same kind and size.

  Returns `None` if they do not, or if the folder holds no run, which the setup of the run reports.
  """
  try:
    folder, _ = folder_of(config.init_from)
    parent = configs.from_json(read_config(folder)).data
    if any(parent[field] != config.data[field] for field in ('tokenizer', 'vocab_size')):
      return None
    return tokenizers.from_json(read_json(folder / 'tokenizer.json'))
  except UserError:
    return None


def check_fits(
  trained: Trained, field: str, program: Program, tokenizer: tokenizers.Tokenizer
) -> None:
  """Raises UserError if a trained run does not fit a program: another tokenizer or other shapes.

  Args:
    trained: the run that the config names.
    field: the config's field that names it, for the message.
    program: the program of the new run.
    tokenizer: the tokenizer of the new run.
  """
  if trained.tokenizer.digest != tokenizer.digest:
    raise UserError(
      f'{field}={trained.workdir!r} was trained on other tokens; valid: a run with this tokenizer'
    )
  shapes = [
    {path: leaf.shape for path, leaf in tree.named(params).items()}
    for params in (trained.params, plan_of(program.model).params)
  ]
  for path in sorted({*shapes[0], *shapes[1]}):
    there, here = (found.get(path) for found in shapes)
    if there != here:
      raise UserError(
        f'{field}={trained.workdir!r} has another shape: {path} is {there or "missing"} there and '
        f'{here or "missing"} here; valid: a run of the same model'
      )
