"""How much time does self-speculative decoding save, with and without training for it?

Two models of 8 layers of width 512 are trained for 300 steps on bytes of the standard library's source,
one of them with layer dropout and exits. Each model generates greedy texts in two ways, token by token
and speculatively, timed in turns in one process: batch 1, float32, 4 drafts a round, prompts from the
validation text. The share of accepted drafts depends on how long the models were trained. Greedy texts
of small models repeat themselves, and repetitions are easy to draft, so the texts are short and start
from several prompts.
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
from sparse_lm.report import categories, plot, results, table
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
  """Both models, each with every exit layer."""
  return [
    Run(CONFIG, SIZE | fields, {'trained with': name, 'exit layer': exit_layer}, execute)
    for name, fields in TRAINED.items()
    for exit_layer in EXITS
  ]


@functools.cache
def _trained(name: str) -> tuple[Decoder, list[np.ndarray], float]:
  """Trains a model. Returns its decoder, prompts, and the mean loss of the last steps in nats/byte."""
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
  """Times both ways to decode. The model is trained once in each process."""
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
  """Writes the table, and a chart of the speed-ups."""
  columns = [
    table.Column('ms', 'speculative decoding', '.2f', 'ms/token'),
    table.Column('plain_ms', 'plain decoding', '.2f', 'ms/token'),
    *table.ratio('ratio', 'speed-up', '.2f'),
    table.Column('accepted', 'accepted drafts', '.1f', '%', 100),
    table.Column('tokens_a_round', 'tokens per verification', '.2f'),
    table.Column('close', f'near ties among {PROMPTS * TOKENS} tokens', '.0f'),
    table.Column('texts_alike', 'texts equal to plain decoding', '.0f', '%', 100),
    table.Column('train_loss', 'training loss', '.2f', 'nats/byte'),
  ]
  frame = table.summarise(lines, ['trained with', 'exit layer'], columns)
  caption = (
    f'Greedy decoding of {TOKENS} tokens after prompts of {PROMPT} bytes, {DRAFT} drafts a round: '
    f'{LAYERS} layers of width 512, batch 1, float32; medians of {REPEATS} turns. The speed-up is the '
    'time of plain decoding / the time of speculative decoding, with quartiles over the turns. The '
    f'models were trained for {STEPS} steps of {BATCH * CONTEXT} bytes; longer training changes the '
    'share of accepted drafts'
  )
  ratio = table.Column('ratio', 'time of plain decoding / time of self-speculation', unit='×')
  figure = categories.bars(lines, 'exit layer', ratio, 'ratio_low', 'ratio_high', 'trained with')
  plot.save(figure, folder, 'self_speculation')
  return table.write(frame, folder, caption, 'python -m experiments.run self_speculation')
