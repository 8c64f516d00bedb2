"""What a user adds is one file: score, signal, router, pattern, format, evaluation, study; each runs.

Attention methods are compared with NumPy in tests/methods/test_attention_of_a_user.py, and routers in the
tests of the methods themselves.
"""

import ast
import contextlib
import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments import loading
from experiments.study import Study
from sparse_lm import evals, patterns, signals
from sparse_lm.core import tree
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.inference import formats
from sparse_lm.inference.pack import Kernel, choose, pack
from sparse_lm.model import slots
from sparse_lm.runs import configs, packed_folder
from sparse_lm.runs.loop import train
from sparse_lm.runs.trained import load
from sparse_lm.weights.method import apply_masks

SCORE = '''
"""Pruning by the diagonal of the Fisher matrix."""

from typing import ClassVar

import jax

from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits


class Fisher(ScoredMethod):
  """Keeps the weights without which the loss would be higher, to second order."""

  traits: ClassVar[Traits] = Traits(
    paper='Theis et al. 2018', saves='what the ramp has dropped', needs=('squared_grads',)
  )

  def scores(self, trainable, signals):
    """Half of the rise of the loss, times two."""
    return jax.tree.map(lambda w, f: w**2 * f, trainable['params'], signals['squared_grads'])
'''

SIGNAL = '''
from typing import ClassVar

from sparse_lm.core.signal import TrainingSignal


class SquaredGrads(TrainingSignal):
  """The squared gradient, over two steps."""

  batches: ClassVar[int] = 2

  def of_gradient(self, weights, gradient):
    return gradient**2
'''

ROUTER = '''
import jax

from sparse_lm.layers.method import Traits
from sparse_lm.layers.mixture import MixtureOfExperts
from sparse_lm.layers.router import Router
from sparse_lm.layers.routing import Routing
from sparse_lm.plan.cost import Gating


class TopOne(MixtureOfExperts):
  """Each token's best expert, at its own probability."""

  @property
  def traits(self):
    return Traits(paper='Fedus et al. 2022', saves='experts', twin='dense', gating=Gating())

  def route(self, x_TxD, mode):
    score_TxE = jax.nn.softmax(Router(self.spec, self.experts, name='router')(x_TxD))
    weight_Tx1, expert_Tx1 = jax.lax.top_k(score_TxE, 1)
    return Routing(expert_Tx1, weight_Tx1, score_TxE, visits=1.0)
'''

PATTERN = '''
from typing import ClassVar

import jax.numpy as jnp

from sparse_lm.core.units import Pattern


class Pairs(Pattern):
  """Two neighbouring inputs of an output are kept or dropped together."""

  spelling: ClassVar[str] = 'pairs'

  def covers(self, path, shape):
    return len(shape) >= 2 and shape[-2] % 2 == 0

  def pool_leaf(self, path, leaf):
    return jnp.mean(leaf.reshape(*leaf.shape[:-2], -1, 2, leaf.shape[-1]), axis=-2)

  def expand_leaf(self, units, shape):
    return jnp.repeat(units, 2, axis=-2)
'''

FORMAT = '''
import jax.numpy as jnp
import numpy as np
from flax import struct

from sparse_lm.core.format import Array, Format


class KeptInputs(Format):
  """The rows of inputs that have any weight, and which inputs these are."""

  rows: Array
  source: Array
  inputs: int = struct.field(pytree_node=False)

  @classmethod
  def misfit(cls, mask):
    return '' if not mask.any(axis=1).all() else 'every input has weights'

  @classmethod
  def pack(cls, kernel, mask):
    source = np.flatnonzero(mask.any(axis=1)).astype(np.int32)
    return cls((kernel * mask)[source], source, mask.shape[0])

  @property
  def shape(self):
    return self.inputs, self.rows.shape[1]

  def kernel(self):
    return jnp.zeros(self.shape, self.rows.dtype).at[self.source].set(self.rows)

  def matmul(self, x):
    return x[..., self.source] @ self.rows
'''

EVALUATION = '''
import dataclasses

import numpy as np

from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values


@dataclasses.dataclass(frozen=True)
class Accuracy(Evaluation):
  """The share of tokens that are the likeliest ones."""

  skipped: int = 0

  def run(self, model: EvalModel, data: EvalData) -> Values:
    right = total = 0.0
    for _, tokens, weight in data.passes():
      best = np.argmax(model.model.apply(model.variables, tokens[:, :-1]), axis=-1)
      weight = weight[:, self.skipped :]
      right += np.sum((best == tokens[:, 1:])[:, self.skipped :] * weight)
      total += np.sum(weight)
    return {'accuracy': float(right / total)}
'''

STUDY = '''"""Do pairs cost accuracy?"""

import json
import pathlib

from experiments.sweep import Run
from sparse_lm import evals
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.runs import configs
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load

SIZE = json.loads((pathlib.Path(__file__).parent / 'size.json').read_text())


def runs():
  return [
    Run('configs/tiny.py', SIZE | {'weight.pattern': name}, {'pattern': name}, execute)
    for name in ('unstructured', 'pairs')
  ]


def execute(run, workdir):
  config = configs.load(run.config, run.overrides)
  result = train(config, str(workdir), progress=False)
  trained = load(str(workdir))
  model = EvalModel(trained.program.model, {'params': trained.params, **trained.model_state})
  found = evals.evaluation('accuracy')(skipped=4).run(model, EvalData.of_split(setup(config).data))
  return result | {'metrics': result['metrics'] | found}


def report(lines, folder):
  return '\\n'.join(f'{x["labels"]["pattern"]} {x["metrics"]["accuracy"]:.6f}' for x in lines)
'''

DROPPED = {
  ('sparse_lm.methods.weight', 'fisher'): SCORE,
  ('sparse_lm.signals', 'squared_grads'): SIGNAL,
  ('sparse_lm.methods.mlp', 'top_one'): ROUTER,
  ('sparse_lm.patterns', 'pairs'): PATTERN,
  ('sparse_lm.inference.formats', 'kept_inputs'): FORMAT,
  ('sparse_lm.evals', 'accuracy'): EVALUATION,
  ('experiments', 'pairs_study'): STUDY,
}
SPARSE = {'weight__name': 'static', 'weight__sparsity': 0.5}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, dropped_in):
  """Where the files are, one to a folder of its own, of which each package knows its one."""
  root = tmp_path_factory.mktemp('of_a_user')
  with contextlib.ExitStack() as stack:
    for (package, name), text in DROPPED.items():
      (own := root / package).mkdir()
      stack.enter_context(dropped_in(package, own, {name: text}))
    yield root


@pytest.fixture(scope='module')
def trained(folder, tiny_config, tmp_path_factory):
  """A run whose weights are kept in pairs."""
  workdir = tmp_path_factory.mktemp('run')
  train(tiny_config(weight__pattern='pairs', **SPARSE), str(workdir), progress=False)
  return load(str(workdir))


def test_each_is_found_by_its_name(folder):
  assert 'fisher' in slots.names('weight') and 'top_one' in slots.names('mlp')
  assert signals.signal('squared_grads').batches == 2
  assert 'pairs' in patterns.spellings()
  assert 'kept_inputs' in formats.names()
  assert 'accuracy' in evals.names()
  assert loading.questions()['pairs_study'] == 'Do pairs cost accuracy?'


def lines_of_code(text):
  """Lines that are neither blank nor part of a docstring."""
  module = ast.parse(text)
  strings = [node for node in ast.walk(module) if isinstance(node, ast.Expr)]
  docstrings = {
    line
    for node in strings
    if isinstance(node.value, ast.Constant)
    for line in range(node.lineno, node.end_lineno + 1)
  }
  lines = enumerate(text.splitlines(), start=1)
  return sum(bool(line.strip()) and number not in docstrings for number, line in lines)


def test_a_score_is_a_dozen_lines():
  assert 5 < lines_of_code(SCORE) <= 15


def test_a_score_keeps_the_weights_of_the_largest_scores(folder):
  draw = np.random.default_rng(0)
  params = {name: draw.standard_normal((16, 8)).astype('f') for name in ('a', 'b')}
  params['scale'] = np.ones(8, 'f')
  target = {'a': np.float32(0.25), 'b': np.float32(0.5), 'scale': None}
  method = slots.method('weight', 'fisher')(total_steps=10, schedule='at_once', start=0.0)
  trainable, sparse = method.init(jax.random.key(0), params, target)
  squared = {name: draw.random((16, 8)).astype('f') for name in ('a', 'b')} | {'scale': None}
  update = method.update(trainable, sparse, {'squared_grads': squared}, 5, jax.random.key(1))
  for name, kept in (('a', 32), ('b', 64)):
    scores = params[name].astype('d') ** 2 * squared[name]
    want = scores >= np.sort(scores, axis=None)[-kept]
    assert_array_equal(update.sparse.masks[name], want)
    assert_array_equal(update.trainable['params'][name], np.where(want, params[name], 0))
  assert update.sparse.masks['scale'] is None


def test_a_score_trains_on_the_signal_that_it_names(folder, tiny_config, tmp_path):
  config = tiny_config(weight__name='fisher', weight__sparsity=0.75, weight__period=2)
  metrics = train(config, str(tmp_path), progress=False)['metrics']
  assert metrics['sparsity_prunable'] == pytest.approx(0.75, abs=1e-3)
  masks = tree.named(load(str(tmp_path)).masks)
  assert all(mask.sum() == round(mask.size / 4) for mask in masks.values()) and len(masks) >= 2


def test_a_router_trains_and_is_charged_for_the_expert_that_runs(folder, tiny_config, tmp_path):
  config = tiny_config(mlp__name='top_one', mlp__experts=4)
  metrics = train(config, str(tmp_path), progress=False)['metrics']
  # An expert is as large as the dense MLP: what is more than the twin's is the router.
  width, hidden, experts, vocab = 16, 32, 4, load(str(tmp_path)).tokenizer.vocab_size
  dense = 2 * (4 * width**2 + 2 * width * hidden + width * vocab) + 4 * 16 * width
  router = 2 * width * experts
  assert metrics['flops_forward_ratio'] == pytest.approx((dense + router) / dense, rel=1e-6)
  assert metrics['val_loss'] < np.log(vocab)


def test_a_pattern_trains_with_masks_of_its_units(trained):
  masks = {path: np.asarray(mask) for path, mask in tree.named(trained.masks).items()}
  pairs = [mask.reshape(-1, 2, mask.shape[-1]) for mask in masks.values()]
  assert len(pairs) >= 2
  for pair in pairs:
    assert_array_equal(pair[:, 0], pair[:, 1])
    kept = pair[:, 0]
    assert kept.sum() == round(kept.size / 2) and 0 < kept[0].mean() < 1


def test_a_format_is_chosen_where_it_is_the_fastest_and_computes_the_same(folder):
  draw = np.random.default_rng(0)
  kernel = draw.standard_normal((512, 512), np.float32)
  mask = np.broadcast_to(draw.random((512, 1)) < 0.4, kernel.shape)
  # It was not measured, so it counts as a dense format of its size.
  found = choose('kernel', Kernel(kernel, mask, kernel.nbytes), {})
  assert formats.name_of(found.runs) == 'kept_inputs'
  x = draw.standard_normal((3, 512), np.float32)
  assert_allclose(found.runs.matmul(x), x @ (kernel * mask), rtol=1e-4, atol=1e-4)
  assert_array_equal(found.runs.kernel(), kernel * mask)


def test_a_packed_folder_is_read_by_the_format_that_it_names(trained, tmp_path, packed_by_bytes):
  every_second = jax.tree.map(
    lambda mask: np.broadcast_to(np.arange(mask.shape[0])[:, None] % 2 > 0, mask.shape),
    trained.masks,
  )
  pruned = apply_masks(trained.params, every_second)
  model = trained.program.model
  packed = pack(model, pruned, every_second, trained.model_state)
  assert {formats.name_of(m.runs) for m in packed.matrices.values()} >= {'kept_inputs'}
  packed_folder.save(packed, trained, str(tmp_path / 'packed'), {'source': 'a test'})
  loaded = packed_folder.load(str(tmp_path / 'packed')).packed
  tokens = np.arange(16, dtype=np.int32)[None] % trained.tokenizer.vocab_size
  logits = packed.model.apply(packed.variables, tokens)
  assert_array_equal(loaded.model.apply(loaded.variables, tokens), logits)
  assert_allclose(logits, model.apply({'params': pruned}, tokens), atol=1e-4)


def test_an_evaluation_gives_numbers_by_name(trained):
  tokens = np.random.default_rng(0).integers(0, trained.tokenizer.vocab_size, 100).astype(np.int32)
  model = EvalModel(trained.program.model, {'params': trained.params})
  found = evals.evaluation('accuracy')().run(model, EvalData(tokens, 16, batch=2))
  right = 0
  for begin in range(0, 99, 16):
    window = tokens[begin : begin + 17]
    best = np.argmax(trained.logits(window[None, :-1])[0], axis=-1)
    right += np.sum(best == window[1:])
  assert found == {'accuracy': pytest.approx(right / 99)}


def test_a_study_runs_what_the_other_files_added(folder, tiny_config, tmp_path):
  plain, wanted = (
    configs.flat(c) for c in (configs.load('configs/tiny.py'), tiny_config(**SPARSE))
  )
  size = {field: value for field, value in wanted.items() if plain.get(field) != value}
  (folder / 'experiments' / 'size.json').write_text(json.dumps(size))
  study = Study.load('pairs_study', tmp_path)
  assert len(study.runs) == 2 and study.train(study.runs) == 0
  rows = dict(row.split() for row in study.report().splitlines())
  assert rows.keys() == {'unstructured', 'pairs'}
  assert all(0.02 < float(value) < 1 for value in rows.values()) and len(set(rows.values())) == 2
