"""`python -m sparse_lm.prune --workdir=PARENT --out=CHILD`: prunes a trained run in one shot."""

import contextlib
import dataclasses
import time

import numpy as np
from ml_collections import ConfigDict

from sparse_lm.commands.config_arguments import add_fields_to_help, overrides_from_args
from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core import rng
from sparse_lm.core.errors import require
from sparse_lm.core.ranges import Range
from sparse_lm.core.tree import Tree
from sparse_lm.runs import configs, measured, runtime, smaller
from sparse_lm.runs.build import build
from sparse_lm.runs.calibrate import GROUPS, calibrate, described
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.evaluate import evaluate, result_of
from sparse_lm.runs.history import History
from sparse_lm.runs.prune_files import check_no_thresholds, prune_files
from sparse_lm.runs.run_folder import WEIGHTS, folder_of
from sparse_lm.runs.setup import Setup, data_of
from sparse_lm.runs.trained import Trained, check_fits, load
from sparse_lm.runs.weight import check_one_shot, groups_of_parts
from sparse_lm.runs.workdir import Workdir, check_new, check_text, whole_folder
from sparse_lm.train import layerwise, one_shot, states
from sparse_lm.train.layerwise import InMemory
from sparse_lm.train.states import TrainState
from sparse_lm.train.work import Work
from sparse_lm.weights.method import Sparse


def prune(
  parent: str, out: str, overrides: dict, segments: int = 128, context: int | None = None
) -> dict:
  """Prunes a trained run or an imported model in one shot and writes the result as a new workdir.

  The workdir can be loaded like that of any run, and other runs can start from it. A workdir with weight
  files is pruned with one layer in memory at a time, and is not evaluated (`runs/prune_files.py`).

  Args:
    parent: workdir of the trained run or the imported model.
    out: the new workdir.
    overrides: values of `config.weight` by dotted name; for weight files, the calibration text too.
    segments: number of calibration sequences, from the training text.
    context: tokens of a calibration sequence; default: those of training, or at most 2048 for weight
      files.

  Returns:
    The contents of result.json.

  Raises:
    UserError: invalid input, before anything is written.
  """
  if (folder_of(parent)[0] / WEIGHTS).is_dir():
    return prune_files(parent, out, overrides, segments, context)
  check_new(out, '--out')
  trained = load(parent)
  check_no_thresholds(trained.model_state, parent)
  asked = configs.derive(trained.config, overrides, allowed=('weight',))
  run = _setup(trained, measured.uniform(asked))
  most = run.config.data.context
  length = most if context is None else context
  require(1 <= length <= most, '--context', length, f'1 to {most}, the tokens of training')
  tokens_NxL = layerwise.calibration(run.data.tokens['train'], segments, length, run.config.seed)
  begin = time.perf_counter()
  run = _with_measured(run, asked, trained, tokens_NxL)
  trainable, sparse = one_shot.prune(
    run.program,
    trained.params,
    trained.model_state,
    run.target,
    tokens_NxL,
    run.config.data.batch,
    run.config.seed,
  )
  seconds = time.perf_counter() - begin
  state = _state(run, trained, trainable, sparse)
  pruned, masks = run.program.finalize(state)
  found = evaluate(run, pruned, state.model_state)
  numbers = found | {'prune_seconds': seconds, 'segments': segments}
  work = Work(ancestors=trained.work.total)
  groups = groups_of_parts(asked.weight).values()
  result = result_of(run, state, masks, numbers, work) | {
    'parent': parent,
    'pruned_from': trained.source,
    'distribution': {group: fields.distribution for group, fields in groups},
  }
  _write(out, run, state, History(masks, run.config.train.steps, work), result)
  return result


def _setup(trained: Trained, config: ConfigDict) -> Setup:
  """Returns the setup of the pruned run, after checks that it fits the trained run."""
  data = data_of(config, trained.tokenizer)
  program, target = build(config, data.tokenizer.vocab_size)
  check_fits(trained, '--workdir', program, data.tokenizer)
  check_text(trained.folder, data, '--workdir')
  check_one_shot(program.method, config.weight)
  return Setup(config, data, program, target)


def _with_measured(
  run: Setup, asked: ConfigDict, trained: Trained, tokens_NxL: np.ndarray
) -> Setup:
  """Returns the setup with the measured distributions that the config asks for, if any."""
  if not measured.asked(asked):
    return run
  measured.check(asked, run.program, run.target)
  parts = InMemory(trained.params, trained.masks)
  batches = one_shot.in_batches(tokens_NxL, run.config.data.batch)
  config = measured.as_maps(asked, run.program, run.target, parts, trained.model_state, batches)
  program, target = build(config, run.data.tokenizer.vocab_size)
  return dataclasses.replace(run, config=config, program=program, target=target)


def _state(run: Setup, trained: Trained, trainable: Tree, sparse: Sparse) -> TrainState:
  """Returns the state of the pruned run."""
  program = run.program
  state = program.init(run.config.seed, run.target)
  state = state.replace(
    step=state.step + trained.step,
    trainable=trainable,
    sparse=sparse,
    opt_state=program.tx.init(trainable),
    ema=states.first_average(program.optimizer, trainable),
    model_state=trained.model_state,
  )
  states.check_masks(program.method, state)
  return state


def _write(out: str, run: Setup, state: TrainState, history: History, result: dict) -> None:
  """Writes the workdir of the pruned run."""
  with (
    whole_folder(out) as path,
    contextlib.closing(Workdir(str(path), run.config, run.data)) as folder,
  ):
    folder.open()
    with contextlib.closing(Checkpoints(folder.path)) as checkpoints:
      # Training that continues from here starts at the beginning of the text's order.
      batches = run.data.train_iterator(rng.data_seed(run.config.seed))
      checkpoints.save(state, batches, history)
    folder.write_result(result)


def _print_shrunk(out: str, result: dict) -> None:
  metrics = result['metrics']
  print(f'shrunk from {result["pruned_from"]}')
  print(
    f'{out}: {metrics["params"]:,} of {metrics["parent_params"]:,} parameters, in '
    f'{metrics["shrink_seconds"]:.1f} s'
  )


@one_line
def main() -> None:
  """Prunes a trained run or an imported model, or calibrates its thresholds if a method has some.

  Prints the validation loss afterwards, if the model is a run.
  """
  parser = Parser('python -m sparse_lm.prune')
  parser.add_argument(
    '--workdir', type=local_path, required=True, help='workdir of a run or of an imported model'
  )
  parser.add_argument(
    '--out', type=local_path, required=True, help='new workdir for the pruned run'
  )
  parser.add_argument(
    '--segments', type=Range(int, '[1, 2^31)'), default=128, help='calibration sequences'
  )
  parser.add_argument(
    '--context',
    type=Range(int, '[1, 2^31)'),
    help='tokens of a calibration sequence; default: those of training, at most 2048 if imported',
  )
  parser.add_argument(
    '--shrink',
    help='sizes of a smaller model in place of masks, such as layers:22,hidden:1024; of layers, width, '
    'hidden, heads and experts',
  )
  add_fields_to_help(parser, ('weight', *GROUPS))
  arguments, rest = parser.parse_known_args()
  runtime.prepare()
  overrides = overrides_from_args(rest)
  out, given = arguments.out, (arguments.segments, arguments.context)
  if arguments.shrink is not None:
    sizes = smaller.parse(arguments.shrink)
    _print_shrunk(out, smaller.shrink(arguments.workdir, out, sizes, overrides, *given))
    return
  if any(field.partition('.')[0] in GROUPS for field in overrides):
    print(f'{out}: {described(calibrate(arguments.workdir, out, overrides, *given))}')
    return
  result = prune(arguments.workdir, out, overrides, *given)
  metrics = result['metrics']
  print(f'pruned from {result["pruned_from"]}')
  loss = (
    f'validation loss {metrics["val_loss"]:.4f} nats per token; ' if 'val_loss' in metrics else ''
  )
  print(
    f'{out}: {loss}{metrics["sparsity_prunable"]:.1%} of the prunable weights dropped in '
    f'{metrics["prune_seconds"]:.1f} s'
  )


if __name__ == '__main__':
  main()
