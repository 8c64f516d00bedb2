"""`python -m sparse_lm.train --config=FILE --workdir=FOLDER`: trains a run, or continues it."""

from sparse_lm.commands.config_arguments import from_command_line
from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.runs import runtime
from sparse_lm.runs.loop import train


@one_line
def main() -> None:
  """Trains a config in a workdir, or continues a run there, and prints the result."""
  parser = Parser('python -m sparse_lm.train')
  parser.add_argument(
    '--workdir',
    type=local_path,
    required=True,
    help='folder of the run; the same command again continues an interrupted run',
  )
  arguments, config = from_command_line(parser)
  runtime.prepare()
  result = train(config, arguments.workdir)
  metrics = result['metrics']
  time = metrics['train_step_ms']
  milliseconds = '—' if time is None else f'{time:.1f}'
  print(
    f'{arguments.workdir}: validation loss {metrics["val_loss"]:.4f} nats per token, '
    f'{metrics["val_bits_per_byte"]:.4f} bits per byte after {metrics["steps"]} steps; '
    f'{metrics["sparsity_prunable"]:.1%} of the prunable weights dropped, '
    f'{metrics["flops_forward_ratio"]:.3f} of the forward FLOPs of the dense twin, '
    f'{milliseconds} ms a step; lowest validation loss {metrics["best_val_loss"]:.4f} at step '
    f'{metrics["best_step"]}'
  )
  for mode, causal in result['causal'].items():
    if not causal:
      print(f'not causal: in mode {mode!r} the model reads later tokens')
  for mode, independent in result.get('batch_independent', {}).items():
    if not independent:
      print(f'not independent: in mode {mode!r} the sequences of a batch influence each other')


if __name__ == '__main__':
  main()
