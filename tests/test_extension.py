"""What a user adds is one file: a pattern, a format, an evaluation, a study, and each of them runs.

Layer methods are dropped in likewise by tests/methods/test_routers_of_a_user.py and
tests/methods/test_attention_of_a_user.py.
"""

import importlib
import json
import sys
import textwrap

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments import run as runner
from sparse_lm import evals, patterns
from sparse_lm.core import tree
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.inference import formats
from sparse_lm.inference.pack import Kernel, choose, pack
from sparse_lm.runs import configs, packed_folder
from sparse_lm.runs.loop import train
from sparse_lm.runs.trained import load
from sparse_lm.weights.method import apply_masks

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
    Run('configs/tiny.py', SIZE | {'weight.pattern': name}, {'pattern': name})
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
  ('sparse_lm.patterns', 'pairs'): PATTERN,
  ('sparse_lm.inference.formats', 'kept_inputs'): FORMAT,
  ('sparse_lm.evals', 'accuracy'): EVALUATION,
  ('experiments', 'pairs_study'): STUDY,
}
SPARSE = {'weight__name': 'static', 'weight__sparsity': 0.5}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the files are, one to a folder of its own, of which each package knows its one."""
  root = tmp_path_factory.mktemp('of_a_user')
  with pytest.MonkeyPatch.context() as patch:
    for (package, name), text in DROPPED.items():
      own = root / package
      own.mkdir()
      (own / f'{name}.py').write_text(textwrap.dedent(text))
      module = importlib.import_module(package)
      patch.setattr(module, '__path__', [*module.__path__, str(own)])
    yield root
  for package, name in DROPPED:
    sys.modules.pop(f'{package}.{name}', None)
    vars(sys.modules[package]).pop(name, None)
  patterns.pattern.cache_clear()


@pytest.fixture(scope='module')
def trained(folder, tiny_config, tmp_path_factory):
  """A run whose weights are kept in pairs."""
  workdir = tmp_path_factory.mktemp('run')
  train(tiny_config(weight__pattern='pairs', **SPARSE), str(workdir), progress=False)
  return load(str(workdir))


def test_each_is_found_by_its_name(folder):
  assert 'pairs' in patterns.spellings()
  assert 'kept_inputs' in formats.names()
  assert 'accuracy' in evals.names()
  assert runner.studies()['pairs_study'] == 'Do pairs cost accuracy?'


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
  study = runner.Study.load('pairs_study', tmp_path)
  assert len(study.runs) == 2 and study.train(study.runs) == 0
  rows = dict(row.split() for row in study.report().splitlines())
  assert rows.keys() == {'unstructured', 'pairs'}
  assert all(0.02 < float(value) < 1 for value in rows.values()) and len(set(rows.values())) == 2
