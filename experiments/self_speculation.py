"""What does self-speculative decoding save in time, and how much of it is training?

Two models of 8 layers of width 512 are trained on bytes of the standard library's source for the same
300 steps, one of them with layer dropout and exits. Each makes the same greedy texts token by token and
speculatively, in turns in one process: batch 1, float32, 4 drafts a round, from prompts of the validation
text. How many drafts are accepted depends on how long the models were trained, and greedy texts of small
models repeat themselves, which is easy to draft: short texts from several prompts keep that small.
"""

import functools
import pathlib

import numpy as np
from tqdm import tqdm

from experiments.sweep import FLOAT32, Run
from sparse_lm.core import rng
from sparse_lm.core.records import JsonObject
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.sample import Sampling
from sparse_lm.inference.speculate import Counts, SelfSpeculation
from sparse_lm.measure import turns
from sparse_lm.report import plot, results, table
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.environment import environment
from sparse_lm.runs.setup import setup

CONFIG = 'configs/base.py'
LAYERS, CONTEXT, BATCH, STEPS = 8, 128, 8, 300
SIZE = {
  'data.context': CONTEXT,
  'data.batch': BATCH,
  'model.layers': LAYERS,
  'model.width': 512,
  'model.hidden': 1024,
  'model.heads': 8,
  'model.kv_heads': 8,
  'optimizer.learning_rate': 1e-3,
  'train.steps': STEPS,
}
TRAINED = {
  'text alone': {},
  'layer dropout and exits': {'stack.name': 'layer_skip'},
}
DRAFT, EXITS = 4, (2, 4)
REPEATS, PROMPTS, PROMPT, TOKENS = 7, 8, 32, 32
GREEDY = Sampling(temperature=0)


def runs() -> list[Run]:
  """Every model with every exit layer."""
  return [
    Run(CONFIG, SIZE | fields, {'trained with': name, 'exit layer': exit_layer}, execute)
    for name, fields in TRAINED.items()
    for exit_layer in EXITS
  ]


@functools.cache
def _trained(name: str) -> tuple[Decoder, list[np.ndarray], float]:
  """A decoder of a trained model, prompts, and the mean loss of the last steps in nats a byte."""
  run = setup(configs.load(CONFIG, SIZE | TRAINED[name] | FLOAT32))
  state = run.program.init(run.config.seed, run.target)
  batches = run.data.train_iterator(rng.data_seed(run.config.seed))
  losses = []
  for step in tqdm(range(STEPS), f'training: {name}', unit='step', leave=False, disable=None):
    state, metrics = run.program.step(step)(state, next(batches))
    losses.append(metrics['loss'])
  params, _ = run.program.finalize(state)
  text = np.asarray(run.data.tokens['validation'][: PROMPTS * CONTEXT], np.int32)
  prompts = list(text.reshape(PROMPTS, CONTEXT)[:, :PROMPT])
  return Decoder(run.program.model, {'params': params}), prompts, float(np.mean(losses[-10:]))


def execute(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Trains the model unless this process has, and times both ways to decode."""
  runtime.prepare()
  config = configs.load(run.config, run.overrides | FLOAT32)
  decoder, prompts, loss = _trained(run.labels['trained with'])
  own = SelfSpeculation(decoder, DRAFT, run.labels['exit layer'])

  def plain() -> list[np.ndarray]:
    made = [decoder.generate([prompt], TOKENS, GREEDY) for prompt in prompts]
    return [np.concatenate(list(tokens)) for tokens in made]

  def speculative() -> list[np.ndarray]:
    return [np.array(list(own.generate(prompt, TOKENS))) for prompt in prompts]

  seconds = turns.interleaved(
    {'plain': plain, 'speculative': speculative}, REPEATS, run.id('speed')
  )
  own.counts = counts = Counts()
  alike = [bool((a == b).all()) for a, b in zip(plain(), speculative())]
  tokens = PROMPTS * TOKENS
  metrics = {
    'ms': 1e3 * float(np.median(seconds['speculative'])) / tokens,
    'plain_ms': 1e3 * float(np.median(seconds['plain'])) / tokens,
    **turns.ratio(seconds['plain'], seconds['speculative']),
    'accepted': counts.accepted / counts.drafted,
    'tokens_a_round': (counts.accepted + counts.rounds) / counts.rounds,
    'close': counts.close,
    'texts_alike': sum(alike) / len(alike),
    'train_loss': loss,
    'train_steps': STEPS,
    'train_tokens': STEPS * BATCH * CONTEXT,
  }
  return {'metrics': metrics, 'config': configs.to_json(config), 'env': environment()}


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """The table, and a chart of the ratios."""
  columns = [
    table.Column('ms', 'speculative', '.2f', 'ms a token'),
    table.Column('plain_ms', 'plain', '.2f', 'ms a token'),
    table.Column('ratio', 'plain / speculative', '.2f'),
    table.Column('ratio_low', 'lower quartile', '.2f'),
    table.Column('ratio_high', 'upper quartile', '.2f'),
    table.Column('accepted', 'drafts accepted', '.1f', '%', 100),
    table.Column('tokens_a_round', 'tokens a verification', '.2f'),
    table.Column('close', f'near ties of {PROMPTS * TOKENS} tokens', '.0f'),
    table.Column('texts_alike', 'texts that are equal', '.0f', '%', 100),
    table.Column('train_loss', 'training loss', '.2f', 'nats a byte'),
  ]
  frame = table.summarise(lines, ['trained with', 'exit layer'], columns)
  caption = (
    f'Greedy decoding, {LAYERS} layers of width 512, batch 1, float32, prompts of {PROMPT} bytes, '
    f'{TOKENS} tokens, {DRAFT} drafts a round; medians of {REPEATS} turns. The models were trained for '
    f'{STEPS} steps of {BATCH * CONTEXT} bytes, and acceptance moves with that'
  )
  ratio = table.Column('ratio', 'time of plain decoding / time of self-speculation')
  figure = plot.bars(lines, 'exit layer', ratio, 'ratio_low', 'ratio_high', 'trained with')
  plot.save(figure, folder, 'self_speculation')
  return table.write(frame, folder, caption, 'python -m experiments.run self_speculation')
