"""`sparse_lm.evaluate` on a pretrained model, which has a tokenizer and no text of its own."""

import json
import math
import pathlib

import numpy as np
import pytest
import tokenizers
from scipy.special import log_softmax

import sparse_lm.evaluate as evaluate_command
from sparse_lm import load
from sparse_lm.convert.importing import convert
from sparse_lm.pack import pack

MODEL = pathlib.Path(__file__).parents[1] / 'convert' / 'models' / 'llama3'
TEXT = 'The dog runs over a river.\nA cat, too!\n' * 12


@pytest.fixture(scope='module')
def imported(tmp_path_factory, packed_by_bytes):
  """The workdir of the model, and a packed folder of it."""
  folder = tmp_path_factory.mktemp('imported')
  convert(str(MODEL), str(folder / 'run'), dtype='float32')
  pack(str(folder / 'run'), str(folder / 'packed'))
  return folder / 'run', folder / 'packed'


@pytest.fixture
def text(tmp_path):
  (tmp_path / 'text.txt').write_text(TEXT)
  return [f'--config.data.path={tmp_path}/text.txt', '--config.data.split=0,0,1', '--split=test']


def log_p(run, tokens, new):
  """Log-probabilities of the last `new` tokens of a sequence."""
  logits = run.logits(np.array(tokens[:-1])[None])[0].astype(np.float64)
  return log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]][-new:]


@pytest.mark.parametrize('packed', [False, True])
def test_perplexity_is_that_of_a_loop_over_windows(call, imported, text, packed):
  given = [f'--workdir={imported[packed]}', '--task=loss', '--context=10', '--stride=7', *text]
  code, out, err = call(evaluate_command, [*given, '--batch=4', '--json'])
  assert code == 0 and not err
  found = json.loads(out)
  library = tokenizers.Tokenizer.from_file(str(MODEL / 'tokenizer.json'))
  tokens = library.encode(TEXT, add_special_tokens=False).ids
  run, log_ps, done = load(imported[0]), [], 0
  for begin in range(0, len(tokens) - 1, 7):
    end = min(begin + 10, len(tokens) - 1)
    log_ps.extend(log_p(run, tokens[begin : end + 1], end - done) if end > done else [])
    done = max(done, end)
  nats = -sum(log_ps)
  assert len(log_ps) == found['cards']['loss']['predictions'] == len(tokens) - 1
  values = found['values']['loss']
  per_token = nats / len(log_ps)
  assert values['test_loss'] == pytest.approx(per_token, rel=1e-5)
  assert values['perplexity'] == pytest.approx(math.exp(per_token), rel=1e-4)
  bits = per_token * len(tokens) / len(TEXT.encode()) / math.log(2)
  assert values['test_bits_per_byte'] == pytest.approx(bits, rel=1e-5)
  text = library.decode(tokens, skip_special_tokens=False)  # this small tokenizer has no line break
  words = len(text.split()) + text.count('\n')
  word = math.exp(per_token * len(tokens) / words)
  assert values['word_perplexity'] == pytest.approx(word, rel=1e-3)


def test_sentences_follow_the_token_that_begins_texts(call, imported, tmp_path):
  pairs = [('The dog', 'The The'), ('a cat', 'zq cat'), ('over it', 'it over')]
  rows = [{'task': 't', 'field': 'f', 'good': good, 'bad': bad} for good, bad in pairs]
  (tmp_path / 'pairs').write_text('\n'.join(map(json.dumps, rows)))
  run = load(imported[0])
  library = tokenizers.Tokenizer.from_file(str(MODEL / 'tokenizer.json'))

  def total(sentence):
    ids = library.encode(sentence, add_special_tokens=False).ids
    return log_p(run, [run.tokenizer.bos, *ids], len(ids)).sum()

  given = [f'--workdir={imported[0]}', '--task=blimp', f'--pairs_file={tmp_path}/pairs', '--json']
  code, out, err = call(evaluate_command, given)
  assert code == 0 and not err
  found = json.loads(out)
  want = np.mean([total(good) > total(bad) for good, bad in pairs])
  assert found['values']['blimp']['blimp'] == pytest.approx(want)
  assert found['cards']['blimp']['begins_with'] == 'bos'


def test_without_a_text_one_line_says_how_to_name_one(call, imported):
  code, out, err = call(evaluate_command, [f'--workdir={imported[0]}'])
  assert code == 2 and not out
  assert err.count('\n') == 1 and 'needs config.data.path; valid: a text file' in err
  code, out, _ = call(evaluate_command, [f'--workdir={imported[0]}', '--task=mqar', '--json'])
  assert code == 0 and json.loads(out)['values']['mqar']['mqar_loss'] > 0
