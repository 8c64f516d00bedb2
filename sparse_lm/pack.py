"""`python -m sparse_lm.pack --workdir=RUN --out=FOLDER`: packs a trained model for inference."""

import jax
import numpy as np
from tabulate import tabulate

from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import UserError
from sparse_lm.core.records import JsonObject
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.pack import PackedModel, total_bytes
from sparse_lm.inference.pack import pack as pack_model
from sparse_lm.runs import packed_folder, runtime
from sparse_lm.runs.trained import Trained, load
from sparse_lm.runs.workdir import check_new

TOLERANCE = 1e-4  # largest error of a logit over the largest logit, in float32
CHECKED = 4  # sequences of the context's length
GREEDY = 200  # tokens of greedy text


def pack(workdir: str, out: str) -> JsonObject:
  """Packs a trained run, compares the packed model with the run, and writes it.

  Args:
    workdir: the run's workdir, or its `best/`.
    out: a new folder, see `runs/packed_folder.py`.

  Returns:
    A dict with `source` (the folder and the checkpoint, in words), `largest_error` (of a logit, divided
    by the largest logit), `same_text` (see `same_text`), `dense_bytes`, `running_bytes` and
    `stored_bytes` (of all arrays), `removed` (a sentence for each removed unit), and `matrices` (a row
    for each matrix).

  Raises:
    UserError: there is no checkpoint, `out` exists, or the packed model's outputs differ from the run's.
  """
  check_new(out, '--out')
  trained = load(workdir)
  packed = pack_model(trained.program.model, trained.params, trained.masks, trained.model_state)
  error = largest_error(trained, packed)
  if trained.program.model.spec.precision == 'float32' and not error <= TOLERANCE:
    raise UserError(
      f'--workdir={workdir}: logits of the packed model are off by {error:.1e} of the largest logit; '
      f'valid: {TOLERANCE:.0e} at most (a gate with nearly equal logits can cause this)'
    )
  facts = {
    'source': trained.source,
    'largest_error': error,
    'same_text': same_text(trained, packed),
    'dense_bytes': total_bytes({'params': trained.params, **trained.model_state}),
    'running_bytes': total_bytes(packed.variables),
  }
  packed_folder.save(packed, trained, out, facts)
  kept = sum(m.stored.nbytes - m.runs.nbytes for m in packed.matrices.values())
  return facts | {
    'stored_bytes': facts['running_bytes'] + kept,
    'removed': packed.removed,
    'matrices': packed_folder.describe(packed),
  }


def largest_error(trained: Trained, packed: PackedModel) -> float:
  """Returns the largest error of a logit of the packed model, divided by the run's largest logit.

  Logits are compared on random tokens. Both maxima are of absolute values.
  """
  spec = packed.model.spec
  shape = (CHECKED, spec.context)
  tokens = np.random.default_rng(0).integers(0, spec.vocab, shape).astype(np.int32)
  want = np.asarray(trained.logits(tokens))
  run = jax.jit(lambda variables, tokens: packed.model.apply(variables, tokens, mode='eval'))
  got = np.asarray(run(packed.variables, tokens))
  return float(np.abs(got - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny))


def same_text(trained: Trained, packed: PackedModel) -> dict[str, int | float | None]:
  """Compares greedy text of the packed model with that of the run, token by token.

  Returns:
    A dict with `tokens`, the number of equal tokens before the texts first differ, and `margin`. The
    margin is the difference between the run's two largest logits at the first different token, divided
    by its largest absolute logit. It is `None` if the texts are equal. The dict is empty if a method
    cannot decode, or if the context has room for one token only.

  Raises:
    UserError: in float32, the texts differ although the margin is larger than rounding errors.
  """
  model = packed.model
  variables = {'params': trained.params, **trained.model_state}
  try:
    pair = [Decoder(model, variables), Decoder(model, packed.variables)]
  except UserError:
    return {}
  count = min(GREEDY, model.spec.context - 1)
  if not count:
    return {}
  begun = [decoder.begin([np.zeros(1, np.int32)])[:2] for decoder in pair]
  for made in range(count):
    twin, own = (np.asarray(logits[0], np.float32) for logits, _ in begun)
    token_B = twin.argmax(keepdims=True).astype(np.int32)
    if own.argmax() != token_B[0]:
      second, best = np.partition(twin, -2)[-2:]
      margin = float((best - second) / max(np.abs(twin).max(), np.finfo(np.float32).tiny))
      if trained.program.model.spec.precision == 'float32' and margin > TOLERANCE:
        raise UserError(
          f'--workdir={trained.workdir}: greedy text of the packed model differs from token {made} on, '
          f'where the two largest logits differ by {margin:.1e} of the largest; valid: '
          f'{TOLERANCE:.0e} at most'
        )
      return {'tokens': made, 'margin': margin}
    place_B = np.full(1, made + 1, np.int32)
    begun = [d.decode(d.variables, cache, token_B, place_B) for d, (_, cache) in zip(pair, begun)]
  return {'tokens': count, 'margin': None}


@one_line
def main() -> None:
  """Packs a run, and prints the format of each matrix."""
  parser = Parser('python -m sparse_lm.pack')
  parser.add_argument('--workdir', type=local_path, required=True, help='workdir of the run')
  parser.add_argument(
    '--out', type=local_path, required=True, help='new folder for the packed model'
  )
  arguments = parser.parse_args()
  runtime.prepare()
  found = pack(arguments.workdir, arguments.out)
  print(tabulate(found['matrices'], headers='keys', tablefmt='github', floatfmt=',.1f'))
  for line in found['removed']:
    print(line)
  print(f'packed from {found["source"]}')
  dense, running, stored = (found[f'{name}_bytes'] / 1e6 for name in ('dense', 'running', 'stored'))
  print(
    f'{arguments.out}: {running:.2f} MB in memory and {stored:.2f} MB on disk, of {dense:.2f} MB dense; '
    f'logits differ by at most {found["largest_error"]:.1e} of the largest; {_text(found["same_text"])}'
  )


def _text(same: dict[str, int | float | None]) -> str:
  if not same:
    return 'greedy text was not compared'
  if same['margin'] is None:
    return f'{same["tokens"]} tokens of greedy text are equal'
  return (
    f'{same["tokens"]} tokens of greedy text are equal, until the two largest logits differ by only '
    f'{same["margin"]:.1e} of the largest'
  )


if __name__ == '__main__':
  main()
