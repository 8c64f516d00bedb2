"""The adapter for lm-eval: what it answers, and, if the package is there, whole tasks."""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from sparse_lm.core.errors import UserError
from sparse_lm.data.tokenizers import Bytes, Chars
from sparse_lm.evals import EvalData, EvalModel, lm_eval
from sparse_lm.evals.lm_eval import LmEval
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of

NONE = EvalData(np.empty(0, np.int32), 16, batch=3)
installed = pytest.mark.skipif(
  importlib.util.find_spec('lm_eval') is None, reason='lm_eval is not installed'
)


@pytest.fixture(scope='module')
def model(tiny_config):
  found = lm.from_config(tiny_config(data__context=16), 256)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: draw.normal(0.5 * (a.ndim == 1), 0.3, a.shape).astype('f'), plan_of(found).params
  )
  return EvalModel(found, {'params': params}, tokenizer=Bytes())


@pytest.fixture(scope='module')
def logits(model):
  """Log-probabilities of the next token after each token of a sequence of up to 16, `[L, V]`."""
  apply = jax.jit(model.model.apply)

  def run(tokens):
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(tokens)] = tokens
    return log_softmax(np.asarray(apply(model.variables, padded)[0], np.float64), -1)[: len(tokens)]

  return run


def pair(logits, before, after):
  """Log-probability of a continuation, and whether it is the likeliest, token by token."""
  total, likeliest = 0.0, True
  for place in range(len(after)):
    log_p = logits((before + after[:place])[-16:])[-1]
    total += log_p[after[place]]
    likeliest &= log_p.argmax() == after[place]
  return total, likeliest


def test_likelihoods_are_those_of_a_loop(model, logits):
  scorer = lm_eval._Scorer(model, NONE)
  best = int(logits(list(b'the'))[-1].argmax())
  pairs = [(list(b'the'), list(b' cat')), ([0], list(b'a')), (list(b'the'), [best])]
  for (total, likeliest), given in zip(scorer.likelihoods(pairs), pairs):
    assert (total, likeliest) == (
      pytest.approx(pair(logits, *given)[0], rel=1e-5),
      given is pairs[2],
    )
  # A context that is too long loses its first tokens.
  long = list(b'in the beginning was the'), list(b'word')
  window = (long[0] + long[1])[-17:]
  want = logits(window[:-1])[range(12, 16), window[13:]].sum()
  assert scorer.likelihoods([long])[0][0] == pytest.approx(want, rel=1e-5)
  with pytest.raises(UserError, match='a continuation has 17 tokens; valid: up to 16'):
    scorer.likelihoods([([0], [1] * 17)])


def test_continuations_are_greedy_and_end_at_a_stop(model, logits):
  scorer = lm_eval._Scorer(model, NONE)
  tokens = list(b'the ')
  for _ in range(8):
    tokens.append(int(logits(tokens)[-1].argmax()))
  whole = Bytes().decode(tokens[4:])
  options = {'until': [], 'max_gen_toks': 8}
  stop = whole[3]
  stopped = options | {'until': [stop, 'never']}
  found = scorer.continuations([('the ', options), ('the ', stopped), ('', options)])
  assert found[:2] == [whole, whole[: whole.index(stop)]] and len(found[2])
  ending = dataclasses.replace(model, tokenizer=_Ending(tokens[6]))
  cut = Bytes().decode(tokens[4 : tokens.index(tokens[6], 4)])
  assert lm_eval._Scorer(ending, NONE).continuations([('the ', options)]) == [cut]


class _Ending(Bytes):
  """Bytes, one of which ends a text."""

  def __init__(self, eos):
    object.__setattr__(self, 'eos', eos)


def test_without_the_package_or_a_task_one_line_says_so(model, monkeypatch):
  with pytest.raises(UserError, match="--benchmarks='' names no task"):
    LmEval().run(model, NONE)
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  with pytest.raises(UserError, match='needs a package; valid: pip install'):
    LmEval('arc_easy').run(model, NONE)
  for tokenizer in (None, Chars('ab')):
    with pytest.raises(UserError, match='a token that begins a text'):
      lm_eval._Scorer(dataclasses.replace(model, tokenizer=tokenizer), NONE)


@installed
def test_the_interface_of_the_harness(model, logits):
  adapter = lm_eval._adapter(lm_eval._Scorer(model, NONE))
  requests = [SimpleNamespace(args=args) for args in (('the ', 'cat'), ('', 'cat'), ('a ', ' b'))]
  found = adapter.loglikelihood(requests, disable_tqdm=True)
  # Spaces at the end of a context belong to the continuation.
  split = [(b'the', b' cat'), (b'\0', b'cat'), (b'a', b'  b')]
  for (total, likeliest), (before, after) in zip(found, split):
    assert total == pytest.approx(pair(logits, list(before), list(after))[0], rel=1e-5)
    assert not likeliest
  text = b'the quick brown fox jumps over dogs'
  rolling = adapter.loglikelihood_rolling([SimpleNamespace(args=(text.decode(),))])
  tokens, want = [0, *text], 0.0
  for begin, end in ((0, 16), (16, 32), (19, 35)):  # the last window is full, and repeats nothing
    new = end - max(begin, 32 if begin == 19 else begin)
    want += logits(tokens[begin:end])[range(16 - new, 16), tokens[end + 1 - new : end + 1]].sum()
  assert rolling == [pytest.approx(want, rel=1e-5)]
  options = {'until': ['\n'], 'max_gen_toks': 4}
  assert len(adapter.generate_until([SimpleNamespace(args=('a', options))])) == 1


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""


@installed
def test_a_task_of_the_harness(model, logits, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
  rows = [
    {'question': f'{word}:', 'choices': ['x', 'no', 'yes'], 'answer': number % 3}
    for number, word in enumerate(('cat', 'dog', 'tree', 'river', 'stone'))
  ]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  file = tmp_path / 'tiny.yaml'
  file.write_text(TASK.replace('FILE', str(tmp_path / 'rows.jsonl')))
  right = []
  for row in rows:
    scores = [
      pair(logits, list(row['question'].encode()), list(b' ' + c.encode())) for c in row['choices']
    ]
    right.append(int(np.argmax([total for total, _ in scores])) == row['answer'])
  values = LmEval(str(file)).run(model, NONE)
  assert values['lm_eval/tiny_choice/acc'] == pytest.approx(np.mean(right))
  assert LmEval(str(file), limit=2).run(model, NONE)['lm_eval/tiny_choice/acc'] == np.mean(
    right[:2]
  )
  assert LmEval(str(file)).card(model, NONE)['begins_with'] == 'zero byte'
  with pytest.raises(UserError, match="--benchmarks='no_such_task' cannot run"):
    LmEval('no_such_task').run(model, NONE)
