"""What the tests share: a small corpus, small configs, a way to stop a run, and outside data."""

import contextlib
import gc
import importlib
import os
import pathlib
import random
import shutil
import signal
import sys
import textwrap
import types

# Before JAX is imported, and for subprocesses too: these tests compile far longer than they compute.
# Set it to 0 to test the very executables that users run.
if os.environ.setdefault(
  'JAX_DISABLE_MOST_OPTIMIZATIONS', '1'
) != '0' and 'xla_cpu_disable_new_fusion_emitters' not in os.environ.get('XLA_FLAGS', ''):
  # Emitting fusions through MLIR is up to half of compilation, and a program compiled in many parts
  # takes cores that other workers need. A jaxlib that does not know the first ignores it.
  os.environ['XLA_FLAGS'] = (
    '--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters '
    f'--xla_cpu_parallel_codegen_split_count=1 {os.environ.get("XLA_FLAGS", "")}'
  )

import jax
import pytest

from experiments import run as experiments_run
from sparse_lm import patterns, signals
from sparse_lm.inference import costs, formats
from sparse_lm.kernels import device
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.loop import train
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS, with_format
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import write_json
from sparse_lm.train.layerwise import of_part
from sparse_lm.train.step import Program

ROOT = pathlib.Path(__file__).resolve().parent.parent

SMALL = {
  'data.source': 'files',
  'data.tokenizer': 'chars',
  'data.context': 16,
  'data.batch': 4,
  'model.layers': 1,
  'model.width': 16,
  'model.hidden': 32,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.precision': 'float32',  # on every device that tests run on
  'train.steps': 12,
  'train.log_every': 1,
  'train.eval_every': 100,
  'train.checkpoint_every': 100,
}


def pytest_collection_finish():
  """Makes garbage collection rare: tracing allocates so much that it took a tenth of the time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope='session')
def without_text():
  """`without_text(trained, folder)`: the model as a workdir with weight files, as by convert."""

  def write(trained, folder):
    files = WeightFiles(folder / WEIGHTS, trained.config.model.layers)
    for part in files.parts:
      params = of_part(trained.params, part)
      files.write(part, params, jax.tree.map(lambda _: None, params))
    files.finish('a test')
    text = {'data.source': 'files', 'data.path': ''}
    config = configs.derive(trained.config, text, allowed=('data',))
    write_json(folder / CONFIG, with_format(configs.to_json(config)))
    shutil.copy(trained.folder / 'tokenizer.json', folder)
    return folder

  return write


@pytest.fixture(scope='module')
def packed_by_bytes():
  """Models far too small to gain by it are packed as large ones are: by their bytes alone."""
  slowdown = {'block': 1.85, 'channels': 1.3, 'dense_in_out': 0.8, 'gather': 2.2}
  by_name = {name: costs.FormatCost(slowdown.get(name, 1.0), 1e3) for name in formats.names()}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(costs, 'current', lambda: costs.FormatCosts('a test', by_name))
    yield


@pytest.fixture(scope='session', autouse=True)
def compiled_programs(request):
  """Compiled programs stay in pytest's cache folder: a second run of the tests starts from them.

  Entry points, which keep theirs in the user's cache folder, are led to the same place.
  """
  folder = request.config.cache.mkdir('compiled')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(folder))
    jax.config.update('jax_compilation_cache_dir', str(folder / 'tests'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
    yield


@contextlib.contextmanager
def _dropped_in(package, folder, files):
  """Files by name, in a folder of their own, are found as if they stood in the package's."""
  for name, text in files.items():
    (folder / f'{name}.py').write_text(textwrap.dedent(text).lstrip())
  module = importlib.import_module(package)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, '__path__', [*module.__path__, str(folder)])
    importlib.invalidate_caches()
    yield
  for name in files:
    sys.modules.pop(f'{package}.{name}', None)
    vars(module).pop(name, None)
  patterns.pattern.cache_clear()
  signals.signal.cache_clear()


@pytest.fixture(scope='session')
def dropped_in():
  """`with dropped_in(package, folder, {name: source}):` the files are the package's; see above."""
  return _dropped_in


@pytest.fixture
def method(tmp_path, dropped_in):
  """`method(slot, name, source)` puts a method into a file of its own among its slot's."""
  with contextlib.ExitStack() as stack:

    def add(slot, name, source):
      stack.enter_context(dropped_in(f'sparse_lm.methods.{slot}', tmp_path, {name: source}))

    yield add


@pytest.fixture
def call(monkeypatch, capfd):
  """`call(command, arguments) -> (exit code, stdout, stderr)`, in this process, for speed."""

  def run(command, given):
    capfd.readouterr()
    with monkeypatch.context() as patch:
      patch.chdir(ROOT)
      patch.setattr(sys, 'argv', ['sparse_lm', *given])
      patch.setattr(runtime, 'prepare', lambda: None)  # it sets up this whole process
      try:
        command.main()
        code = 0
      except SystemExit as stop:
        code = stop.code
    captured = capfd.readouterr()
    return code, captured.out, captured.err

  return run


@pytest.fixture
def run_study(call):
  """`run_study(argument, ...)`: what `python -m experiments.run` does with these arguments."""

  def run(*arguments):
    code, out, err = call(experiments_run, arguments)
    return types.SimpleNamespace(code=code, out=out, err=err)

  return run


@pytest.fixture(scope='session')
def text_file(tmp_path_factory):
  """Some 8000 characters of words in random order."""
  draw = random.Random(0)
  words = [
    'the',
    'of',
    'and',
    'river',
    'stone',
    'tree',
    'cat',
    'dog',
    'runs',
    'over',
    'under',
    'a\n',
    'blue',
    'quick',
    'lazy',
  ]
  path = tmp_path_factory.mktemp('corpus') / 'text.txt'
  path.write_text(' '.join(draw.choices(words, k=1700)))
  return path


@pytest.fixture(scope='session')
def tiny_config(text_file):
  """`tiny_config(weight__name='rigl', ...)`: configs/tiny.py, shrunk; `__` stands for a dot."""

  def load(config='configs/tiny.py', **overrides):
    given = {name.replace('__', '.'): value for name, value in overrides.items()}
    return configs.load(str(ROOT / config), {**SMALL, 'data.path': str(text_file), **given})

  return load


@pytest.fixture
def on_nvidia(monkeypatch):
  """`on_nvidia(9, 0)`: the device is taken for an NVIDIA GPU of that compute capability with cuDNN 9.10.

  Programs can be traced and lowered for it, and not run.
  """
  # JAX asks the device for these before it lowers its fused attention.
  cudnn = importlib.import_module('jax._src.cudnn.fused_attention_stablehlo')

  def numbers(capability):
    return tuple(map(int, capability.split('.')))

  def pretend(*capability, version=91000):
    monkeypatch.setattr(device, 'compute_capability', lambda: capability)
    monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: version)
    checks = {
      'check_compute_capability': lambda asked: capability >= numbers(asked),
      'is_cuda_compute_capability_equal': lambda asked: capability == numbers(asked),
    }
    for name, check in checks.items():
      monkeypatch.setattr(cudnn, name, check)

  return pretend


@pytest.fixture
def train_until(monkeypatch):
  """`train_until(config, workdir, step)` trains until SIGTERM arrives during that step."""

  def run(config, workdir, step):
    compiled = Program.step

    def signalled(program, number):
      if number + 1 == step:
        signal.raise_signal(signal.SIGTERM)
      return compiled(program, number)

    with monkeypatch.context() as patch:
      patch.setattr(Program, 'step', signalled)
      with pytest.raises(SystemExit) as stopped:
        train(config, str(workdir), progress=False)
    assert stopped.value.code == 128 + signal.SIGTERM

  return run


@pytest.fixture
def shared_data():
  """`shared_data('brown')`: a path under ../shared/data; skips, saying what is missing, if none."""

  def find(name):
    path = ROOT.parent / 'shared' / 'data' / name
    if not path.exists():
      pytest.skip(f'{name} is missing: place it at ../shared/data/{name}, beside the repository')
    return path

  return find
