"""`python -m sparse_lm.convert`: pretrained models of other libraries in, models of this project out."""

import time

from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.convert.importing import convert
from sparse_lm.core.ranges import Range
from sparse_lm.layers.spec import WEIGHTS_DTYPES
from sparse_lm.runs import runtime


@one_line
def main() -> None:
  """Converts a model and prints what was written."""
  parser = Parser('python -m sparse_lm.convert')
  parser.add_argument(
    '--from', dest='source', type=local_path, help='a folder of Hugging Face, or a .gguf file'
  )
  parser.add_argument('--out', type=local_path, required=True, help='a new folder')
  parser.add_argument(
    '--dtype', choices=WEIGHTS_DTYPES, default='', help='default: that of the source'
  )
  parser.add_argument(
    '--context',
    type=Range(int, '[0, 2^24]'),
    default=0,
    help='config.data.context; 0 = as many tokens as the model has positions',
  )
  given = parser.parse_args()
  runtime.prepare()
  begin = time.perf_counter()
  made = convert(given.source, given.out, given.dtype, given.context)
  model = made.config.model
  count = sum(leaf.size for leaf in made.shapes.values())
  print(
    f'{given.out}: {type(made.foreign.family).__name__}, {model.layers} layers of width {model.width}, '
    f'{count:,} parameters in {model.weights_dtype}, {made.config.data.context} tokens of context; '
    f'{time.perf_counter() - begin:.1f} s'
  )


if __name__ == '__main__':
  main()
