"""`python -m sparse_lm.convert`: imports a pretrained model, exports a workdir, or upcycles its MLPs.

python -m sparse_lm.convert --from=FOLDER_OR_GGUF --out=WORKDIR
python -m sparse_lm.convert --workdir=WORKDIR --to=hf --out=FOLDER
python -m sparse_lm.convert --workdir=WORKDIR --upcycle=experts:8,k:2 --out=WORKDIR
"""

import argparse
import time

from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.convert.exporting import export
from sparse_lm.convert.importing import convert
from sparse_lm.convert.upcycling import Upcycling, upcycle
from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import Range
from sparse_lm.layers.spec import WEIGHTS_DTYPES
from sparse_lm.runs import runtime


def _arguments() -> argparse.Namespace:
  parser = Parser('python -m sparse_lm.convert')
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument(
    '--from', dest='source', type=local_path, help='a folder of Hugging Face, or a .gguf file'
  )
  source.add_argument('--workdir', type=local_path, help='a model of this project')
  parser.add_argument('--out', type=local_path, required=True, help='a new folder')
  parser.add_argument(
    '--dtype', choices=WEIGHTS_DTYPES, help='dtype of the weights; default: that of --from'
  )
  parser.add_argument(
    '--context',
    type=Range(int, '[0, 2^24]'),
    default=0,
    help='config.data.context; 0 = as many tokens as the model has positions',
  )
  parser.add_argument('--to', choices=('hf',), help='write --workdir as a folder of Hugging Face')
  parser.add_argument(
    '--upcycle', help='make every MLP of --workdir a mixture of experts, such as experts:8,k:2'
  )
  given = parser.parse_args()
  if given.workdir and (given.to is None) == (given.upcycle is None):
    raise UserError(
      '--workdir needs one of --to and --upcycle; valid: --to=hf, --upcycle=experts:8,k:2'
    )
  if given.source and (given.to or given.upcycle):
    raise UserError('--to and --upcycle read a workdir; valid: --workdir=W instead of --from')
  if given.workdir and (given.dtype or given.context):
    raise UserError('--dtype and --context are of --from; valid: --workdir=W without them')
  return given


@one_line
def main() -> None:
  """Converts a model and prints what was written."""
  given = _arguments()
  runtime.prepare()
  begin = time.perf_counter()
  if given.to:
    done = export(given.workdir, given.out)
    text = f'{done.family}, {done.parameters:,} parameters, from {done.source}'
    text += '' if done.tokenizer else '; without a tokenizer, which transformers has no class for'
  elif given.upcycle:
    size = Upcycling.parse(given.upcycle)
    text = (
      f'{size.experts} experts in each layer, from {upcycle(given.workdir, given.out, size).source}'
    )
  else:
    made = convert(given.source, given.out, given.dtype or '', given.context)
    model, count = made.config.model, sum(leaf.size for leaf in made.shapes.values())
    text = (
      f'{type(made.foreign.family).__name__}, {model.layers} layers of width {model.width}, {count:,} '
      f'parameters in {model.weights_dtype}, {made.config.data.context} tokens of context'
    )
  print(f'{given.out}: {text}; {time.perf_counter() - begin:.1f} s')


if __name__ == '__main__':
  main()
