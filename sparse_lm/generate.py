"""`python -m sparse_lm.generate --workdir=FOLDER --prompt=TEXT`: samples text from a model."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import Range
from sparse_lm.data.hf_tokenizer import HuggingFace
from sparse_lm.inference.decode import Decoder, shortened
from sparse_lm.inference.sample import TEMPERATURE, TOP_P, Sampling
from sparse_lm.inference.speculate import SelfSpeculation, check_greedy
from sparse_lm.measure import energy
from sparse_lm.runs import runtime
from sparse_lm.runs.runnable import Runnable, load

PLAIN = Sampling()


def generate(
  run: Runnable,
  prompts: Sequence[str],
  tokens: int = 0,
  sampling: Sampling = PLAIN,
  stop: str = '',
  seed: int = 0,
  speculation: SelfSpeculation | None = None,
  rendered: bool = False,
) -> Iterator[list[str]]:
  """Yields the continuations of all prompts so far, after each new token.

  A continuation ends before the token that ends a text, if the tokenizer has one.

  Args:
    run: a model, from `runs.runnable.load`.
    prompts: texts, which may differ in length.
    tokens: new tokens for each prompt; 0 = as many as the context has room for.
    sampling: how tokens are drawn.
    stop: text that ends a continuation. It is not part of the continuation. '' = none.
    seed: seed of the draws.
    speculation: self-speculative decoding of a single prompt, greedy only; `None` = token by token.
    rendered: whether the prompts spell out their special tokens, as chat templates do. Otherwise the
      tokenizer adds those that begin a text.

  Raises:
    UserError: a prompt that does not fit the context or the tokenizer, or an option outside its range.
  """
  encode = run.tokenizer.encode if rendered else run.tokenizer.encode_prompt
  encoded = [np.asarray(encode(_utf8(prompt))) for prompt in prompts]
  asked = tokens
  tokens = tokens or max(run.model.spec.context - max(map(len, encoded)), 1)
  made: list[list[int]] = [[] for _ in prompts]
  texts, open_ = [''] * len(prompts), [True] * len(prompts)
  if speculation is None:
    decoder = Decoder(run.model, run.variables)
    decoder.check_prompts(encoded)
    if asked:
      decoder.check_room(encoded, asked)
      room = max(map(len, encoded)) + asked
      decoder = Decoder(shortened(run.model, room), run.variables)
    made_BxT = decoder.generate(encoded, tokens, sampling, seed)
  else:
    check_greedy(sampling.temperature, prompts)
    made_BxT = (np.array([token]) for token in speculation.generate(encoded[0], tokens))
  for token_B in made_BxT:
    for row in np.flatnonzero(open_):
      if token_B[row] == run.tokenizer.eos:
        open_[row] = False
        continue
      made[row].append(int(token_B[row]))
      text = run.tokenizer.decode(made[row])
      open_[row] = not (stop and stop in text)
      texts[row] = text if open_[row] else text[: text.index(stop)]
    yield list(texts)
    if not any(open_):
      return


def _utf8(prompt: str) -> bytes:
  try:
    return prompt.encode()
  except UnicodeEncodeError:
    raise UserError(f'--prompt={prompt!r} is not UTF-8; valid: UTF-8 text') from None


def _chats(run: Runnable, prompts: Sequence[str]) -> list[str]:
  """Returns each prompt as the first message of a conversation."""
  if not isinstance(run.tokenizer, HuggingFace):
    raise UserError(
      '--chat needs the tokenizer of an imported model with a chat template; valid: without --chat'
    )
  return [run.tokenizer.chat([{'role': 'user', 'content': prompt}]) for prompt in prompts]


def _arguments() -> argparse.Namespace:
  parser = Parser('python -m sparse_lm.generate')
  parser.add_argument('--workdir', type=local_path, required=True, help='workdir or packed folder')
  parser.add_argument(
    '--prompt', required=True, action='append', help='repeat this option for a batch'
  )
  parser.add_argument(
    '--tokens', type=Range(int, '[0, 2^31)'), default=0, help='new tokens; 0 = fill the context'
  )
  parser.add_argument('--temperature', type=TEMPERATURE, default=1.0, help='0 = greedy')
  parser.add_argument(
    '--top_k', type=Range(int, '[0, 2^31)'), default=0, help='draw from the k largest; 0 = all'
  )
  parser.add_argument('--top_p', type=TOP_P, default=1.0, help='nucleus sampling; 1 = off')
  parser.add_argument(
    '--chat', action='store_true', help="each prompt is a message, in the tokenizer's chat template"
  )
  parser.add_argument('--stop', default='', help='text that ends the continuation')
  parser.add_argument('--seed', type=Range(int, '[0, 2^31)'), default=0)
  parser.add_argument(
    '--speculate', type=Range(int, '[0, 2^31)'), default=0, help='drafted tokens per round; 0 = off'
  )
  parser.add_argument(
    '--exit_layer',
    type=Range(int, '[0, 2^31)'),
    default=0,
    help='layers of the draft model; 0 = half',
  )
  return parser.parse_args()


def _stream(texts: Iterator[list[str]], stop: str) -> list[str]:
  """Prints a single continuation while it is generated, and returns the final texts.

  Bytes that are not yet a whole character, or that may be the beginning of `stop`, are printed later.
  """
  shown, last = 0, ['']
  for last in texts:
    whole = last[0].rstrip('\ufffd')
    begun = next((n for n in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:n])), 0)
    whole = whole[: len(whole) - begun]
    if len(last) == 1 and len(whole) > shown:
      print(whole[shown:], end='', flush=True)
      shown = len(whole)
  if len(last) == 1:
    print(last[0][shown:])
  return last


@one_line
def main() -> None:
  """Streams one continuation, or prints several. The time and energy go to stderr."""
  arguments = _arguments()
  runtime.prepare()
  run = load(arguments.workdir)
  prompts = _chats(run, arguments.prompt) if arguments.chat else arguments.prompt
  sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
  speculation = None
  if arguments.speculate or arguments.exit_layer:
    speculation = SelfSpeculation(
      Decoder(run.model, run.variables), arguments.speculate, arguments.exit_layer
    )
  begin, count, meter = time.perf_counter(), 0, energy.meter()

  def counted() -> Iterator[list[str]]:
    nonlocal count
    options = prompts, arguments.tokens, sampling, arguments.stop, arguments.seed
    texts = generate(run, *options, speculation, rendered=arguments.chat)
    for text in texts:
      if not count and len(text) == 1:  # all input has been checked by now
        print(arguments.prompt[0], end='', flush=True)
      count += 1
      yield text

  with meter as measured:
    texts = _stream(counted(), arguments.stop)
  if len(texts) > 1:
    for prompt, text in zip(arguments.prompt, texts):
      print(f'--- {prompt}{text}')
  seconds = time.perf_counter() - begin
  joules = energy.per_token(measured.joules, count * len(texts))
  print(
    f'{count} tokens per prompt in {seconds:.1f} s, compilation included; energy: {joules}; '
    f'{run.source}',
    file=sys.stderr,
  )
  if speculation is not None:
    print(speculation.counts, file=sys.stderr)


if __name__ == '__main__':
  main()
