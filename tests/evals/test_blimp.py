"""Minimal pairs, against a loop over sentences."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from sparse_lm.core.errors import UserError
from sparse_lm.data.tokenizers import Bytes, Chars
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.blimp import Blimp
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of

NONE = EvalData(np.empty(0, np.int32), 16, batch=5)
PAIRS = [
  ('binding', 'syntax', 'he sees him', 'he sees her'),
  ('binding', 'syntax', 'a', 'b'),
  ('agree', 'syntax', 'dogs run here', 'dogs runs her'),
  ('agree', 'syntax', 'the cat', 'the cats walk'),
  ('agree', 'syntax', 'the cat', 'the cat'),
  ('plural', 'form/meaning', 'two dogs!!!', 'two dog'),
]


def model_of(config, tokenizer):
  model = lm.from_config(config, tokenizer.vocab_size)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: draw.normal(0.5 * (a.ndim == 1), 0.3, a.shape).astype('f'), plan_of(model).params
  )
  return EvalModel(model, {'params': params}, tokenizer=tokenizer)


@pytest.fixture(scope='module')
def model(tiny_config):
  return model_of(tiny_config(data__context=16), Bytes())


@pytest.fixture
def file(tmp_path):
  def write(pairs=PAIRS, name='pairs.jsonl'):
    rows = [dict(zip(('task', 'field', 'good', 'bad'), pair)) | {'term': 'x'} for pair in pairs]
    text = '\n'.join(map(json.dumps, rows))
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith('gz') else text.encode())
    return str(path)

  return write


def log_p(model, text, begin='\0'):
  """Log-probability of a text after the zero byte, alone and without padding."""
  tokens = np.concatenate([model.tokenizer.encode(begin), model.tokenizer.encode(text)])
  logits = model.model.apply(model.variables, tokens[None, :-1].astype(np.int32))[0]
  chosen = log_softmax(np.asarray(logits, np.float64), -1)[range(len(tokens) - 1), tokens[1:]]
  return chosen.sum()


@pytest.mark.parametrize('name', ['pairs.jsonl', 'pairs.jsonl.gz'])
def test_the_share_of_pairs_is_that_of_a_loop(model, file, name):
  values = Blimp(file(name=name)).run(model, NONE)
  right = {}
  for task, field, good, bad in PAIRS:
    right.setdefault((field.replace('/', '_'), task), []).append(
      log_p(model, good) > log_p(model, bad)
    )
  tasks = {f'blimp/{field}/{task}': np.mean(each) for (field, task), each in right.items()}
  assert {key: x for key, x in values.items() if key.count('/') == 2} == tasks
  assert values['blimp'] == pytest.approx(np.mean(list(tasks.values())))
  syntax = [x for key, x in tasks.items() if '/syntax/' in key]
  assert values['blimp/syntax'] == pytest.approx(np.mean(syntax))
  assert values['blimp/form_meaning'] == tasks['blimp/form_meaning/plural']
  assert 0 < values['blimp'] < 1


def test_swapped_pairs_have_the_opposite_share(model, file):
  different = [pair for pair in PAIRS if pair[2] != pair[3]]
  swapped = [(*names, bad, good) for *names, good, bad in different]
  ours, theirs = (Blimp(file(pairs)).run(model, NONE) for pairs in (different, swapped))
  assert theirs['blimp'] == pytest.approx(1 - ours['blimp'])


def test_only_the_first_pairs_of_each_task_are_read(model, file):
  few = Blimp(file(), pairs=1)
  first = [PAIRS[0], PAIRS[2], PAIRS[5]]
  assert few.run(model, NONE) == Blimp(file(first, 'first.jsonl')).run(model, NONE)
  card = few.card(model, NONE)
  assert card['pairs'] == card['tasks'] == 3 and card['begins_with'] == 'zero byte'
  assert card['data_sha256'] == Blimp(file(name='a.jsonl.gz')).card(model, NONE)['data_sha256']


def test_without_a_token_that_begins_texts_the_first_token_is_given(tiny_config, file):
  tokenizer = Chars(''.join(sorted('abcd ')))
  model = model_of(tiny_config(data__context=16), tokenizer)
  pairs = [('t', 'f', 'ab cd', 'abcd'), ('u', 'f', 'a bcd', 'dd')]
  values = Blimp(file(pairs)).run(model, NONE)
  for task, _, good, bad in pairs:
    assert values[f'blimp/f/{task}'] == (log_p(model, good, '') > log_p(model, bad, ''))
  assert Blimp(file(pairs)).card(model, NONE)['begins_with'] == 'nothing'
  with pytest.raises(UserError, match='a sequence has 1 tokens; valid: 2 to 17'):
    Blimp(file([('t', 'f', 'a', 'b')])).run(model, NONE)


def test_experts_of_limited_capacity_score_a_sentence_as_if_it_were_alone(tiny_config, file):
  config = tiny_config(data__context=16, mlp__name='moe_topk', mlp__eval_capacity=0.5)
  model = model_of(config, Bytes())
  assert not lm.batch_independent(model.model)['eval']
  whole = Blimp(file()).run(model, NONE)
  alone = Blimp(file()).run(model, dataclasses.replace(NONE, batch=1))
  assert whole == alone


BAD = {
  'missing': ('no/such/file', 'no/such/file'),
  'not JSON': (b'{"task": ', 'cannot be read'),
  'no pair': (b'\n', 'holds no pair'),
  'no key': (b'{"task": "a", "field": "b", "good": "c"}', 'pair 1 lacks a text'),
  'gzip': (b'\x1f\x8b123', 'cannot be read'),
  'none': ('', 'names no file'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_files_are_one_line(case, model, tmp_path):
  content, said = BAD[case]
  path = content
  if isinstance(content, bytes):
    path = str(tmp_path / 'pairs')
    (tmp_path / 'pairs').write_bytes(content)
  with pytest.raises(UserError, match=said) as error:
    Blimp(path).run(model, NONE)
  assert '--pairs_file=' in str(error.value) and 'valid: a file of JSON lines' in str(error.value)


def test_sentences_that_do_not_fit_are_refused(model, file):
  with pytest.raises(UserError, match='a sequence has 31 tokens; valid: 2 to 17'):
    Blimp(file([('t', 'f', 'a' * 30, 'b')])).run(model, NONE)
  with pytest.raises(UserError, match='need a tokenizer'):
    Blimp(file()).run(dataclasses.replace(model, tokenizer=None), NONE)
