"""What an imported model can do in the other commands: train, generate, prune and pack."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sparse_lm import generate as generate_command
from sparse_lm import loading
from sparse_lm.convert import __main__ as convert_command
from sparse_lm.convert.importing import convert
from sparse_lm.core.errors import UserError
from sparse_lm.inference.decode import Decoder, shortened
from sparse_lm.inference.sample import Sampling
from sparse_lm.pack import pack
from sparse_lm.prune import prune
from sparse_lm.runs import configs, runnable
from sparse_lm.runs.calibrate import calibrate
from sparse_lm.runs.loop import train
from sparse_lm.runs.trained import load

MODELS = pathlib.Path(__file__).parent / 'models'
TRAINING = {'train.steps': 1, 'data.context': 16, 'data.batch': 2, 'weight.name': 'static'}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('imported') / 'llama3'
  convert(str(MODELS / 'llama3'), str(path))
  return str(path)


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'words.txt'
  words = np.random.default_rng(0).integers(2, 61, 2000)
  path.write_text(' '.join(f'w{word}' for word in words))
  return str(path)


def test_a_run_that_starts_from_it_has_its_model_tokenizer_and_methods(workdir, text, tmp_path):
  given = TRAINING | {'init_from': workdir, 'data.path': text, 'model.dropout': 0.1}
  config = configs.load('configs/base.py', given)
  parent = load(workdir)
  changed = {'dropout': 0.1}
  assert dict(config.model) == {**parent.config.model, **changed}
  assert config.mlp == parent.config.mlp and config.activation == parent.config.activation
  train(config, str(tmp_path / 'run'), progress=False)
  child = load(str(tmp_path / 'run'))
  assert child.tokenizer.digest == parent.tokenizer.digest and child.step == 1
  # A run that starts from this one inherits the same.
  again = configs.load('configs/base.py', given | {'init_from': str(tmp_path / 'run')})
  assert again.model == config.model and again.mlp == config.mlp
  other = configs.load('configs/base.py', given | {'model.rope_base': 7.0, 'mlp.name': 'dense'})
  assert other.model.rope_base == 7.0 and other.mlp.name == 'dense'


@pytest.mark.slow
def test_a_run_without_its_parent_is_pruned_and_calibrated(workdir, text, tmp_path):
  parent = shutil.copytree(workdir, tmp_path / 'parent')
  given = TRAINING | {'init_from': str(parent), 'data.path': text, 'weight.name': 'none'}
  train(configs.load('configs/base.py', given), str(tmp_path / 'run'), progress=False)
  shutil.rmtree(parent)
  prune(str(tmp_path / 'run'), str(tmp_path / 'pruned'), {'weight.name': 'magnitude'}, 1)
  calibrate(str(tmp_path / 'run'), str(tmp_path / 'teal'), {'site.name': 'teal'}, 1)
  tokens = load(str(tmp_path / 'run')).tokenizer
  assert (
    load(str(tmp_path / 'pruned')).tokenizer == load(str(tmp_path / 'teal')).tokenizer == tokens
  )


def test_a_run_inherits_the_thresholds_of_an_imported_model(workdir, text, tmp_path):
  calibrate(workdir, str(tmp_path / 'teal'), {'site.name': 'teal', 'data.path': text}, 1, 8)
  given = TRAINING | {'init_from': str(tmp_path / 'teal'), 'data.path': text}
  config = configs.load('configs/base.py', given)
  assert config.site == load(str(tmp_path / 'teal')).config.site
  other = configs.load('configs/base.py', given | {'site.name': 'none'})
  assert other.site.name == 'none'


def test_without_text_one_line_says_what_to_set(workdir):
  config = configs.load('configs/base.py', TRAINING | {'init_from': workdir})
  with pytest.raises(UserError, match=r"source='files' needs config\.data\.path"):
    train(config, '/nowhere/run', progress=False)
  lone = {'data.tokenizer': 'hf'} | TRAINING
  with pytest.raises(UserError, match=r"tokenizer='hf' is the tokenizer of an imported model"):
    train(configs.load('configs/base.py', lone), '/nowhere/run', progress=False)


def test_generation_begins_and_ends_as_the_tokenizer_says(workdir, call):
  run = loading.load(workdir)
  greedy = run.generate('w5 w9 w3', max_new_tokens=8, temperature=0)
  assert greedy.split()[0].startswith('w')
  model = runnable.load(workdir)
  (ids,) = (model.tokenizer.encode_prompt('w5 w9 w3'),)
  made = [
    int(t[0]) for t in Decoder(model.model, model.variables).generate([ids], 8, Sampling(0.0))
  ]
  end = made.index(1) if 1 in made else len(made)
  assert greedy == model.tokenizer.decode(made[:end])
  # The token that comes third ends the text of a tokenizer that calls it the end.
  stop = made[2]
  assert stop not in made[:2]
  ended = model.tokenizer.__class__(model.tokenizer.contents, 61, 0, stop)
  object.__setattr__(model.origin, 'tokenizer', ended)
  last = list(generate_command.generate(model, ['w5 w9 w3'], 8, Sampling(0.0)))[-1]
  assert last == [ended.decode(made[:2])]
  code, _, err = call(generate_command, [f'--workdir={workdir}', '--prompt=w3', '--chat'])
  assert code == 2 and 'no chat template' in err


def test_a_shorter_cache_gives_the_same_tokens(workdir):
  run = runnable.load(workdir)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sparse_lm.inference.decode._ROUNDED', 4)
    short = shortened(run.model, 10)
  assert short.spec.context == 12
  prompt = run.tokenizer.encode('w5 w9 w3')
  pair = [Decoder(model, run.variables) for model in (run.model, short)]
  one, two = ([int(t[0]) for t in d.generate([prompt], 7, Sampling(0.0))] for d in pair)
  assert one == two
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(d.cache(1))) for d in pair]
  assert sizes[1] < 0.4 * sizes[0]
  learned = run.model.clone(
    spec=run.model.spec.__class__(**{**vars(run.model.spec), 'positions': 'learned'})
  )
  assert shortened(learned, 4) is learned


def test_an_imported_model_is_packed(workdir, tmp_path):
  facts = pack(workdir, str(tmp_path / 'packed'))
  assert facts['largest_error'] < 1e-5
  tokens = np.load(MODELS / 'llama3' / 'logits.npz')['tokens'][:, :8]
  one, two = loading.load(workdir), loading.load(str(tmp_path / 'packed'))
  np.testing.assert_allclose(one.logits(tokens), two.logits(tokens), atol=1e-4)
  assert_array_equal(two.tokenizer.encode('w5 w9'), [5, 9])


def test_the_command_says_what_it_wrote(call, tmp_path):
  code, out, err = call(
    convert_command, [f'--from={MODELS / "qwen2"}', f'--out={tmp_path / "out"}']
  )
  assert code == 0 and 'Qwen2, 2 layers of width 24' in out and 'in bfloat16, 40 tokens' in out, err
