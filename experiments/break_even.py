"""Up to which density is each packed format faster than dense matrices on this device?

Products with eight packed matrices are timed in turns with products with eight dense matrices. With
eight matrices, all but the smallest weights are read from memory instead of a cache. `block:B` keeps
random tiles of B × B weights, and `channels` keeps random inputs. `gather` reads random inputs of one
token, which a model would have to select first. The speed-ups are those of single matrices, not of a
model.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweep import Run
from sparse_lm.core.format import Format
from sparse_lm.core.records import JsonObject
from sparse_lm.inference import formats
from sparse_lm.measure import turns
from sparse_lm.report import plot, results, table
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.arithmetic import resolved
from sparse_lm.runs.environment import environment

CONFIG = 'configs/base.py'
SHAPES = ((128, 512), (768, 768), (768, 3072))
BATCHES = (1, 8, 64)
DENSITIES = (0.75, 0.5, 0.25, 0.1, 0.05)
FORMATS = ('block:32', 'block:64', 'block:128', 'channels', 'gather')
RATIOS = (0.5, 1, 2, 4, 8)  # marked in the figure
MATRICES, REPEATS = 8, 15


def runs() -> list[Run]:
  """One run for each format, shape, batch and density. `gather` runs with batch 1 alone."""
  return [
    Run(
      CONFIG,
      {},
      {'format': name, 'matrix': f'{i}x{o}', 'batch': batch, 'density': density},
      execute,
    )
    for name in FORMATS
    for i, o in SHAPES
    for batch in (BATCHES if name != 'gather' else (1,))
    for density in DENSITIES
    if _kept((i, o), density, _parse(name)[1]) >= 1
  ]


def _parse(label: str) -> tuple[str, int]:
  """Splits a label into the format and the size of its tiles (1 = single weights)."""
  name, _, size = label.partition(':')
  return name, int(size or 1)


def _kept(shape: tuple[int, int], density: float, size: int) -> int:
  """The number of tiles that a matrix keeps."""
  return round(density * (shape[0] // size) * (shape[1] // size))


def execute(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Times one packed format in turns with the dense format."""
  runtime.prepare()
  name, size = _parse(run.labels['format'])
  shape = tuple(map(int, run.labels['matrix'].split('x')))
  density, batch = run.labels['density'], run.labels['batch']
  draw = np.random.default_rng(0)
  kernels = [draw.standard_normal(shape, np.float32) for _ in range(MATRICES)]
  whole = np.ones(shape, bool)
  dense = jax.device_put([formats.load('dense_out_in').pack(k, whole) for k in kernels])
  masks = [_mask(draw, shape, density, size, name) for _ in kernels]
  packed = jax.device_put([formats.load(name).pack(k, m) for k, m in zip(kernels, masks)])
  x = jnp.ones((batch, shape[0]))
  index = jnp.asarray(np.sort(draw.permutation(shape[0])[: round(density * shape[0])]))

  @jax.jit
  def multiply(matrices: list[Format], x: jax.Array) -> jax.Array:
    return sum(matrix.matmul(x) for matrix in matrices)

  @jax.jit
  def gather(matrices: list[Format], x: jax.Array, index: jax.Array) -> jax.Array:
    return sum(matrix.of_inputs(x[0, index], index) for matrix in matrices)

  calls = {'dense': functools.partial(multiply, dense, x)}
  if packed[0].selects == -2:
    calls['packed'] = functools.partial(gather, packed, x, index)
  else:
    calls['packed'] = functools.partial(multiply, packed, x)
  seconds = turns.interleaved(calls, REPEATS)
  ratio = turns.ratio(seconds['dense'], seconds['packed'])
  metrics = {key.replace('ratio', 'speedup'): value for key, value in ratio.items()}
  metrics |= {f'{k}_us': 1e6 * float(np.median(v)) / MATRICES for k, v in seconds.items()}
  # The density that whole tiles give: 4 of 36 tiles where 0.1 is asked for.
  metrics['density'] = len(index) / shape[0] if name == 'gather' else float(np.mean(masks))
  return {
    'metrics': metrics,
    'config': configs.to_json(resolved(configs.load(CONFIG))),
    'env': environment(),
  }


def _mask(
  draw: np.random.Generator, shape: tuple[int, int], density: float, size: int, name: str
) -> np.ndarray:
  if name == 'gather':
    return np.ones(shape, bool)
  if name == 'channels':
    kept = draw.permutation(shape[0]) < round(density * shape[0])
    return np.broadcast_to(kept[:, None], shape)
  tiles = (shape[0] // size, shape[1] // size)
  kept = draw.permutation(tiles[0] * tiles[1]).reshape(tiles) < _kept(shape, density, size)
  return np.kron(kept, np.ones((size, size), bool))


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table of break-even densities, and a figure of speed-up against density for batch 1."""
  rows = _rows(lines)
  columns = [
    table.Column('break_even', 'faster up to density', '.2f'),
    *(table.Column(f'at_{d}', f'speed-up at density {d}', '.2f', '×') for d in DENSITIES),
    table.Column('dense_us', 'dense product', ',.0f', 'µs'),
  ]
  frame = table.summarise(rows, ['format', 'matrix', 'batch'], columns)
  caption = (
    f'Products with packed matrices beside products with dense matrices, float32; medians of {REPEATS} '
    'turns. The speed-up is dense time / packed time. 0.00 = faster at no density that was measured'
  )
  matrix = f'{SHAPES[-1][0]}x{SHAPES[-1][1]}'
  shown = [
    line for line in lines if line['labels']['batch'] == 1 and line['labels']['matrix'] == matrix
  ]
  x = table.Column('density', 'density', '.2f')
  y = table.Column('speedup', 'dense time / packed time', '.2f', '×')
  if shown:
    figure = plot.curves(shown, x, y, 'format')
    (axes,) = figure.axes
    axes.set(xscale='log', yscale='log')
    axes.set_title(f'matrices of {matrix}, batch 1', fontsize='small')
    axes.set_xticks(DENSITIES, map(str, DENSITIES))
    axes.set_yticks(RATIOS, map(str, RATIOS))
    axes.minorticks_off()
    plot.save(figure, folder, 'break_even')
  return table.write(frame, folder, caption, 'python -m experiments.run break_even')


def _rows(lines: list[results.Line]) -> list[results.Line]:
  """Joins the lines of one format, matrix and batch, which differ in density, into one line."""
  rows: dict[tuple, results.Line] = {}
  for line in lines:
    labels = {key: line['labels'][key] for key in ('format', 'matrix', 'batch')}
    never = {'break_even': 0.0}
    row = rows.setdefault(tuple(labels.values()), line | {'labels': labels, 'metrics': never})
    metrics, density = line['metrics'], line['labels']['density']
    row['metrics'] |= {f'at_{density}': metrics['speedup'], 'dense_us': metrics['dense_us']}
    if metrics['speedup'] > 1:
      row['metrics']['break_even'] = max(row['metrics']['break_even'], metrics['density'])
  return list(rows.values())
