"""From which context on does MoBA decode faster than full attention?

A model of 4 layers of width 512 with 8 heads decodes one token at a time with a full cache of 512 to
4096 keys. Full attention is timed in turns with MoBA (mixture of block attention), which reads 3 blocks
of keys and the mean of every block. Blocks have 128 keys and, in long contexts, also 512, as in the
paper. The MLPs are as narrow as the model, so that attention is a large part of the work. Weights are
random: the bytes that a token reads from the cache do not depend on the text. This study does not
measure accuracy.
"""

import pathlib

import jax
import numpy as np

from experiments.sweep import FLOAT32, Overrides, Run
from sparse_lm.core.records import JsonObject
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.workload import DECODED, DecodeCall, workload
from sparse_lm.measure import turns
from sparse_lm.model import lm, plans
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost
from sparse_lm.report import categories, plot, results, table
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.environment import environment

CONFIG = 'configs/base.py'
VOCAB, REPEATS = 256, 15
ROWS = ((128, 512), (128, 1024), (128, 2048), (512, 2048), (128, 4096), (512, 4096))
CHOSEN = 3
SIZE = {
  'model.layers': 4,
  'model.width': 512,
  'model.hidden': 512,
  'model.heads': 8,
  'model.kv_heads': 8,
}


def runs() -> list[Run]:
  """One run for each context and block size. A run times both kinds of attention in one process."""
  labels = {pair: {'blocks': f'{CHOSEN} of {pair[0]} keys', 'context': pair[1]} for pair in ROWS}
  return [Run(CONFIG, _blocks(*pair), labels[pair], execute) for pair in ROWS]


def _full(context: int) -> Overrides:
  return SIZE | {'data.context': context}


def _blocks(size: int, context: int) -> Overrides:
  fields = {'attention.name': 'moba', 'attention.block': size, 'attention.k': CHOSEN}
  return _full(context) | fields


def execute(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Times decoding with both kinds of attention, and counts the bytes read from the cache."""
  runtime.prepare()
  context = run.labels['context']
  text = np.random.default_rng(0).integers(0, VOCAB, context)
  calls, metrics = {}, {}
  for name, overrides in (('full', _full(context)), ('blocks', run.overrides)):
    model = lm.from_config(configs.load(run.config, overrides | FLOAT32), VOCAB)
    variables = jax.device_put({'params': jax.tree.map(_random, plan_of(model).params)})
    calls[name] = DecodeCall(Decoder(model, variables), workload(text, context, batch=1))
    metrics[f'{name}_cache_bytes'] = cost.read_bytes(plans.reads(model, variables))
  seconds = turns.interleaved(calls, REPEATS, f'context {context}')
  for name, taken in seconds.items():
    low, mid, high = np.percentile(1e3 * taken / DECODED, (25, 50, 75))
    metrics |= {f'{name}_ms': mid, f'{name}_ms_low': low, f'{name}_ms_high': high}
  ratio = turns.ratio(seconds['full'], seconds['blocks'])
  metrics |= {key.replace('ratio', 'speedup'): value for key, value in ratio.items()}
  config = configs.load(run.config, run.overrides | FLOAT32)
  return {'metrics': metrics, 'config': configs.to_json(config), 'env': environment()}


def _random(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
  return 0.04 * np.random.default_rng(leaf.size).standard_normal(leaf.shape, np.float32)


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table, and a chart of the speed-ups."""
  columns = [
    table.Column('full_ms', 'full attention', '.2f', 'ms/token'),
    table.Column('blocks_ms', 'MoBA', '.2f', 'ms/token'),
    *table.ratio('speedup', 'speed-up', '.2f'),
    table.Column('full_cache_bytes', 'cache read by full attention', '.2f', 'MB/token', 1e-6),
    table.Column('blocks_cache_bytes', 'cache read by MoBA', '.2f', 'MB/token', 1e-6),
  ]
  frame = table.summarise(lines, ['context', 'blocks'], columns)
  caption = (
    'Decoding with a full cache: full attention beside MoBA. 4 layers of width 512 with 8 heads, '
    f'float32, batch 1; medians of {REPEATS} turns in one process. The speed-up is the time of full '
    'attention / the time of MoBA, with quartiles over the turns'
  )
  context = table.Column('context', 'context length', unit='tokens')
  ratio = table.Column('speedup', 'decode: time of full attention / time of blocks', unit='×')
  figure = categories.bars(lines, context, ratio, 'speedup_low', 'speedup_high', 'blocks')
  plot.save(figure, folder, 'block_attention')
  return table.write(frame, folder, caption, 'python -m experiments.run block_attention')
