"""Calibration of the thresholds of a trained run or an imported model, which becomes a new workdir."""

import contextlib
import time

from ml_collections import ConfigDict

from sparse_lm.core import rng
from sparse_lm.core.errors import require
from sparse_lm.core.records import JsonObject
from sparse_lm.model import lm, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import configs
from sparse_lm.runs.build import build
from sparse_lm.runs.checkpoint import EVALUATED, Checkpoints
from sparse_lm.runs.configs import Overrides
from sparse_lm.runs.environment import environment
from sparse_lm.runs.evaluate import evaluate, result_of
from sparse_lm.runs.history import History
from sparse_lm.runs.prune_files import TOGETHER, calibration_text, opened
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS, folder_of, with_format
from sparse_lm.runs.runnable import OTHER_TEXT
from sparse_lm.runs.setup import Setup, data_of
from sparse_lm.runs.trained import check_fits, load
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import Workdir, check_new, check_text, whole_folder, write_json
from sparse_lm.train import layerwise, one_shot, thresholds
from sparse_lm.train.layerwise import InMemory
from sparse_lm.train.work import Work

GROUPS = ('activation', 'site')  # the slots whose methods have thresholds


def calibrate(
  parent: str, out: str, overrides: Overrides, segments: int, context: int | None = None
) -> JsonObject:
  """Calibrates the thresholds of a trained run or an imported model; the result is a new workdir.

  The weights stay as they are. Those of weight files are read one layer at a time, and the model is not
  evaluated.

  Args:
    parent: workdir of the trained run or the imported model.
    out: the new workdir.
    overrides: values of `GROUPS` by dotted name; for weight files, of `OTHER_TEXT` too.
    segments: number of calibration sequences, from the training text.
    context: tokens of a calibration sequence; by default as in `prune`.

  Returns:
    The contents of result.json.

  Raises:
    UserError: invalid input, before anything is written.
  """
  check_new(out, '--out')
  if (folder_of(parent)[0] / WEIGHTS).is_dir():
    return _of_files(parent, out, overrides, segments, context)
  trained = load(parent)
  config = _derived(trained.config, overrides)
  data = data_of(config, trained.tokenizer)
  program, target = build(config, data.tokenizer.vocab_size)
  check_fits(trained, '--workdir', program, data.tokenizer)
  check_text(trained.folder, data, '--workdir')
  thresholds.densities(program.model)
  run, most = Setup(config, data, program, target), config.data.context
  length = most if context is None else context
  require(1 <= length <= most, '--context', length, f'1 to {most}, the tokens of training')
  tokens_NxL = layerwise.calibration(data.tokens['train'], segments, length, config.seed)
  begin = time.perf_counter()
  parts = InMemory(trained.params, trained.masks)
  batches = one_shot.in_batches(tokens_NxL, config.data.batch)
  state = trained.program.init(config.seed, trained.target)
  with contextlib.closing(Checkpoints(*folder_of(parent))) as checkpoints:
    state = checkpoints.restore(state, items=EVALUATED)
  found = thresholds.calibrate(program.model, parts, trained.model_state, batches)
  state = state.replace(model_state=found)
  numbers = {'calibrate_seconds': time.perf_counter() - begin, 'segments': segments}
  numbers |= evaluate(run, trained.params, found)
  work = Work(ancestors=trained.work.total)
  result = result_of(run, state, trained.masks, numbers, work)
  result |= {'parent': parent, 'calibrated_from': trained.source}
  with (
    whole_folder(out) as path,
    contextlib.closing(Workdir(str(path), config, data)) as folder,
  ):
    folder.open()
    with contextlib.closing(Checkpoints(folder.path)) as checkpoints:
      history = History(trained.masks, config.train.steps, work)
      checkpoints.save(state, data.train_iterator(rng.data_seed(config.seed)), history)
    folder.write_result(result)
  return result


def _derived(config: ConfigDict, overrides: Overrides) -> ConfigDict:
  """Returns the config with overrides; by default, an activation wraps that of the trained model."""
  own = config.activation
  if overrides.get('activation.name', own.name) != own.name:
    overrides = {'activation.inner.name': own.name, **overrides}
    if overrides['activation.inner.name'] == own.name:
      fields = slots.fields(own)
      overrides = {f'activation.inner.{field}': fields[field] for field in fields} | overrides
  return configs.derive(config, overrides, allowed=GROUPS)


def _of_files(
  parent: str, out: str, overrides: Overrides, segments: int, context: int | None
) -> JsonObject:
  """Does the same as `calibrate` for a workdir with weight files."""
  source = opened(parent)
  text = {field: value for field, value in overrides.items() if field in OTHER_TEXT}
  own = {field: value for field, value in overrides.items() if field not in text}
  config = _derived(source.config, own)
  model = lm.from_config(config, source.tokenizer.vocab_size)
  thresholds.densities(model)
  read = calibration_text(
    source.config, text, source.tokenizer, model.spec.context, segments, context
  )
  begin, files = time.perf_counter(), source.files
  batches = one_shot.in_batches(read.tokens_NxL, max(1, TOGETHER // read.tokens_NxL.shape[1]))
  parts = source.parts(plan_of(model).params)
  found = thresholds.calibrate(model, parts, files.model_state, batches)
  numbers = {'calibrate_seconds': time.perf_counter() - begin, 'segments': segments}
  result = {
    'config': configs.to_json(config),
    'env': environment(),
    'calibration': read.card,
    'metrics': {'steps': files.step, **numbers},
    'parent': parent,
    'calibrated_from': files.source,
  }
  with whole_folder(out) as path:
    child = WeightFiles(path / WEIGHTS, files.layers)
    for part in files.parts:
      child.write(part, *files.read(part))
    child.write_state(found)
    work = Work(ancestors=files.work.total)
    child.finish(f'{files.source}, with calibrated thresholds', files.step, work)
    write_json(path / 'env.json', environment())
    write_json(path / 'tokenizer.json', source.tokenizer.to_json())
    write_json(path / CONFIG, with_format(configs.to_json(config)))
    write_json(path / 'result.json', result)
  return result


def described(result: JsonObject) -> str:
  """Returns what was calibrated, in words."""
  metrics = result['metrics']
  loss = (
    f'validation loss {metrics["val_loss"]:.4f} nats per token; ' if 'val_loss' in metrics else ''
  )
  return f'{loss}thresholds calibrated in {metrics["calibrate_seconds"]:.1f} s'
