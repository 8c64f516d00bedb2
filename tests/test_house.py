"""The rules of the house, read from the source: what may be named where, typed parameters, and sizes."""

import ast
import functools
import pathlib
import re
import statistics

import pytest

from sparse_lm.core import discovery

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ('sparse_lm', 'experiments', 'configs', 'tests', 'colab')
FILES = [
  str(path.relative_to(ROOT)) for name in FOLDERS for path in sorted((ROOT / name).rglob('*.py'))
]
OURS = [path for path in FILES if path.startswith('sparse_lm/')]
TYPED = [path for path in FILES if path.startswith(('sparse_lm/', 'experiments/'))]
# Functions of JAX that are called in `sparse_lm/kernels/` and nowhere else.
KERNELS = ('top_k', 'approx_max_k', 'ragged_dot', 'dot_product_attention')
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FILE = 400, 60, 100

# Folders whose files are found by name: methods, patterns, signals, formats, evaluations, families.
PACKAGES = (
  *(
    f'sparse_lm.methods.{path.name}'
    for path in sorted((ROOT / 'sparse_lm/methods').glob('[a-z]*/'))
  ),
  'sparse_lm.patterns',
  'sparse_lm.signals',
  'sparse_lm.inference.formats',
  'sparse_lm.evals',
  'sparse_lm.convert.families',
)
# Names that are English words or NumPy's: these are sought as whole strings, in quotes, and behind
# `name=`; all others anywhere in a string.
WORDS = (
  'block', 'channels', 'column', 'dense', 'energy', 'floor', 'full', 'gated', 'gather', 'global', 'grads',
  'head', 'layer', 'loss', 'neuron', 'none', 'plain', 'residual', 'row', 'set', 'speed', 'static',
)  # fmt: skip

# What a word means where it stands, if not the method, pattern, signal or format of that name.
UNIT = 'the kind of a unit, as a module declares it; a pattern is called after the kind'
PARAMETER = 'the name of a parameter or a module, or a role of one'
LABEL = 'what a table or figure calls the dense twin'
SIGNAL = 'a signal that the method needs, and reads by its name'
KEY = "a key of a method's config"
DISPLAY = 'a part of the name that tables and figures show'
METRIC = 'a number that a training step gives, by its name in logs'
INITIALISATION = 'how weights are initialised'
PROGRESS = 'the unit of a progress bar'
FOREIGN = "another library's name of an activation, a tokenizer or a field"
IMPORTED = 'a method that the configs of imported models name'
ABSENT = 'nothing, to a reader or to Matplotlib'
TWIN = 'the dense twin of the method, which depends on its fields'
REMAT = 'what the backward pass of a layer computes again'
MEANS_SOMETHING_ELSE = {
  'sparse_lm/convert/families/gpt_neox.py': {'gelu': FOREIGN},
  'sparse_lm/convert/families/mixtral.py': {'sliding_window': FOREIGN},
  'sparse_lm/convert/gguf_tokenizer.py': {'gpt2': FOREIGN, 'qwen2': FOREIGN},
  'sparse_lm/convert/importing.py': {'layer': PROGRESS},
  'sparse_lm/convert/upcycling.py': {'layer': PROGRESS},
  'sparse_lm/convert/llama_like.py': {'silu': FOREIGN, 'sliding_window': FOREIGN},
  'sparse_lm/convert/methods.py': dict.fromkeys(
    ('dense', 'gated', 'gelu', 'moe_topk', 'relu', 'relu2', 'silu'), IMPORTED
  ),
  'sparse_lm/data/prepared.py': {'none': ABSENT},
  'sparse_lm/inference/pack.py': {'neuron': UNIT},
  'sparse_lm/inference/shrink.py': {'layer': UNIT},
  'sparse_lm/inference/time_formats.py': {'dense': 'what a packed kernel is timed beside'},
  'sparse_lm/layers/attention.py': {'head': UNIT},
  'sparse_lm/layers/embed.py': {'head': PARAMETER, 'gpt2': INITIALISATION},
  'sparse_lm/layers/experts.py': {'neuron': UNIT},
  'sparse_lm/layers/feed_forward.py': {'neuron': UNIT},
  'sparse_lm/layers/init.py': {'head': PARAMETER, 'gpt2': INITIALISATION},
  'sparse_lm/layers/spec.py': {'full': REMAT, 'none': ABSENT, 'head': PARAMETER},
  'sparse_lm/methods/mlp/gated.py': {'neuron': UNIT},
  'sparse_lm/methods/mlp/moe_topk.py': {'dense': TWIN, 'gated': TWIN},
  'sparse_lm/methods/mlp/predictor_topk.py': {'neuron': UNIT},
  'sparse_lm/methods/weight/alps.py': {'xtx': SIGNAL},
  'sparse_lm/methods/weight/movement_soft.py': {'movement': DISPLAY},
  'sparse_lm/methods/weight/rigl.py': {'grads': SIGNAL},
  'sparse_lm/methods/weight/snip.py': {'grads': SIGNAL},
  'sparse_lm/methods/weight/sparsegpt.py': {'xtx': SIGNAL},
  'sparse_lm/methods/weight/wanda.py': {'x_sq': SIGNAL},
  'sparse_lm/model/slots.py': {'dense': KEY},
  'sparse_lm/pack.py': {'dense': LABEL},
  'sparse_lm/plan/plan.py': {'layer': UNIT},
  'sparse_lm/report/categories.py': {'dense': LABEL},
  'sparse_lm/report/plot.py': {'none': ABSENT},
  'sparse_lm/report/style.py': {'none': ABSENT},
  'sparse_lm/report/training_log.py': {'loss': METRIC},
  'sparse_lm/runs/console.py': {'dense': LABEL},
  'sparse_lm/runs/record.py': {'loss': METRIC},
  'sparse_lm/runs/at_start.py': {'gpt2': INITIALISATION},
  'sparse_lm/train/objective.py': {'loss': METRIC},
  'sparse_lm/train/one_shot.py': {'layer': 'the unit of a progress bar'},
  'sparse_lm/train/importance.py': {'head': UNIT, 'layer': UNIT, 'neuron': UNIT, 'x_sq': SIGNAL},
  'sparse_lm/train/outliers.py': {'layer': 'the unit of a progress bar', 'x_sq': SIGNAL},
  'sparse_lm/weights/one_shot.py': {'block': KEY},
  'sparse_lm/weights/random_start.py': {'layer': KEY, 'none': KEY},
}

# Modules that are about one implementation import it.
ABOUT = {
  # What every training run evaluates, logs, and chooses its best checkpoint by.
  'sparse_lm/runs/evaluate.py': 'sparse_lm.evals.loss',
  # What `run.evaluate()` measures by default.
  'sparse_lm/loading.py': 'sparse_lm.evals.loss',
  # The command that prints this evaluation as a table, of several models in turns.
  'sparse_lm/speed.py': 'sparse_lm.evals.speed',
}


def source(path):
  return (ROOT / path).read_text(encoding='utf-8')


@functools.cache
def implementations():
  """By name, the files that implement it."""
  found = {}
  for package in PACKAGES:
    folder = package.replace('.', '/')
    files = {p.stem.rstrip('_'): f'{folder}/{p.name}' for p in (ROOT / folder).glob('*.py')}
    for name in discovery.names(package):
      found.setdefault(name, set()).add(files[name])
  return found


def literals(tree):
  """Strings that are no docstrings, the twin that a method declares, or the default of its pattern."""
  left_out = set()
  for node in ast.walk(tree):
    if (
      isinstance(node, ast.Expr)
      or (isinstance(node, ast.keyword) and node.arg == 'twin')
      or (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == 'pattern')
    ):
      left_out.add(node.value)
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
      yield node


def says(text, name):
  """Whether a string names an implementation."""
  if name not in text:
    return False
  if text == name or re.search(rf"name=['\"]?{name}\b|['\"]{name}['\"]", text):
    return True
  return name not in WORDS and bool(re.search(rf'(?<![\w-]){name}(?![\w-])', text))


def names_in(text, path):
  """The implementations that a source names outside their own files, and the lines."""
  found = {}
  for node in literals(ast.parse(text)):
    for name, own in implementations().items():
      if path not in own and says(node.value, name):
        found.setdefault(name, []).append(node.lineno)
  return found


def imports_of(text, path):
  """Modules of implementations that a source imports, its own package's base left out."""
  package = pathlib.PurePosixPath(path).parent.parts
  files = {own for owns in implementations().values() for own in owns} - {path}
  modules = {own.removesuffix('.py').replace('/', '.') for own in files}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else ()
      module = '.'.join((*base, *filter(None, [node.module])))
      dotted = {module, *(f'{module}.{alias.name}' for alias in node.names)}
      yield from sorted(dotted & modules)


def asked_for(text):
  """Lines with `getattr` or `hasattr` of an attribute that is written out."""
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ('getattr', 'hasattr'):
      yield from (node.lineno for name in node.args[1:2] if isinstance(name, ast.Constant))


def kernels_in(text):
  """Lines that use what `sparse_lm/kernels/` chooses a backend for."""
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Attribute) and node.attr in KERNELS:
      # A field of the same name, such as that of an argument parser, is none.
      if ast.unparse(node.value) in ('jax.lax', 'lax', 'jax.nn', 'nn'):
        yield node.lineno
    elif isinstance(node, ast.ImportFrom) and node.module in ('jax.lax', 'jax.nn'):
      yield from (node.lineno for alias in node.names if alias.name in KERNELS)


def untyped(text):
  """`function.parameter` or `function.return` of what has no annotation, or one with `Any` in it.

  `Any` counts at any depth, and in annotations that are strings. `self` and `cls` need no annotation.
  """
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      a = node.args
      every = filter(None, (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg))
      found = {one.arg: one.annotation for one in every if one.arg not in ('self', 'cls')}
      for name, annotation in (found | {'return': node.returns}).items():
        if annotation is None or says_any(annotation):
          yield f'{node.name}.{name}'


def says_any(annotation):
  """Whether `Any` stands anywhere in an annotation."""
  for node in ast.walk(annotation):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      if says_any(ast.parse(node.value, mode='eval')):
        return True
    elif 'Any' in (getattr(node, 'id', None), getattr(node, 'attr', None)):
      return True
  return False


def long_functions(text):
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = node.end_lineno - node.lineno + 1
      if lines > LONGEST_FUNCTION:
        yield f'{node.name} has {lines} lines'


@pytest.mark.parametrize('path', OURS)
def test_an_implementation_is_named_in_its_own_file_alone(path):
  found = names_in(source(path), path)
  allowed = MEANS_SOMETHING_ELSE.get(path, {})
  assert not {name: lines for name, lines in found.items() if name not in allowed}


@pytest.mark.parametrize('path', OURS)
def test_no_implementation_is_imported(path):
  assert set(imports_of(source(path), path)) <= {ABOUT.get(path)}


@pytest.mark.parametrize('path', TYPED)
def test_attributes_are_declared_and_not_asked_for(path):
  assert not list(asked_for(source(path)))


def test_kernels_are_called_by_the_functions_that_choose_them():
  found = {path: list(kernels_in(source(path))) for path in OURS}
  assert not {path: lines for path, lines in found.items() if lines and '/kernels/' not in path}
  assert found['sparse_lm/kernels/topk.py'] and found['sparse_lm/kernels/attention.py']


@pytest.mark.parametrize('path', TYPED)
def test_every_parameter_and_return_value_has_a_type(path):
  assert not list(untyped(source(path)))


def test_the_lists_of_exceptions_hold_nothing_that_is_gone():
  for path, module in ABOUT.items():
    assert module in imports_of(source(path), path)
  for path, words in MEANS_SOMETHING_ELSE.items():
    assert set(words) <= names_in(source(path), path).keys(), path


def test_files_are_short():
  lines = {path: len(source(path).splitlines()) for path in FILES}
  assert not {path: count for path, count in lines.items() if count > LONGEST_FILE}
  # Files that hold nothing would make the median of the others look smaller.
  assert statistics.median(lines[path] for path in OURS if lines[path]) <= MEDIAN_FILE


def test_functions_are_short():
  # `get_config` of the base config is a list of fields, one a line.
  checked = [path for path in FILES if path != 'configs/base.py']
  long = {path: list(long_functions(source(path))) for path in checked}
  assert not {path: functions for path, functions in long.items() if functions}


FAULTS = '''
def f(x: Any, y: 'Any | None', *rest: Any, z: dict[str, Any] = None, **more: int) -> Any:
  """Says rigl."""
  def g(a, b: tuple[tuple[str, typing.Any], ...], *c, d: Tree, **e) -> Callable[..., 'list[Any]']:
    return lambda x: x
  class Anything:
    @classmethod
    async def h(cls, a: Anything, b: 'AnyStr') -> None: pass
    def i(self): pass
  if hasattr(x, 'twin') or getattr(x, y):
    raise UserError('valid: config.weight.name=set, or the rigl of 2020')
  from sparse_lm.methods.weight import rigl
  import sparse_lm.patterns.n_of_m
  from sparse_lm.evals import speed
  from ..patterns import row
  from jax.lax import approx_max_k
  jax.lax.top_k(x, y.top_k)
  return x == 'block', 'a block', "the 'head'", 'per_output', 'energy', 'no energy'
'''


def test_what_the_rules_find():
  """A source that breaks each of them, and what is near to it and breaks none."""
  path = 'sparse_lm/runs/new.py'
  assert set(names_in(FAULTS, path)) == {*('set', 'rigl', 'block', 'head', 'per_output', 'energy')}
  assert 'rigl' not in names_in(FAULTS, 'sparse_lm/methods/weight/rigl.py')
  assert sorted(imports_of(FAULTS, path)) == [
    'sparse_lm.evals.speed',
    'sparse_lm.methods.weight.rigl',
    'sparse_lm.patterns.n_of_m',
    'sparse_lm.patterns.row',
  ]
  assert len(list(asked_for(FAULTS))) == 1
  assert len(list(kernels_in(FAULTS))) == 2
  assert list(untyped(FAULTS)) == [
    *('f.x', 'f.y', 'f.z', 'f.rest', 'f.return'),
    *('g.a', 'g.b', 'g.c', 'g.e', 'g.return', 'i.return'),
  ]
  assert list(long_functions(FAULTS)) == []
  assert list(long_functions('def g():\n' + 60 * '  pass\n')) == ['g has 61 lines']
