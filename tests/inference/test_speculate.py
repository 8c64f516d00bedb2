"""Self-speculative decoding generates the text of plain decoding, whatever the drafts are."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import random_variables

from sparse_lm import generate
from sparse_lm.core.errors import UserError
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.sample import Sampling
from sparse_lm.inference.speculate import CLOSE, SelfSpeculation
from sparse_lm.layers.cache import LENGTH
from sparse_lm.model import lm
from sparse_lm.runs.loop import train

VOCAB, CONTEXT, LAYERS = 11, 32, 3
GREEDY = Sampling(temperature=0)
# An attention, an MLP and a depth method that decode each in their own way, and the plain model.
CASES = {
  'plain': {},
  'window': {'attention.name': 'sliding_window', 'attention.window': 5},
  'topk_keys': {'attention.name': 'topk_keys', 'attention.k': 3, 'mlp.name': 'moe_topk'},
  'depth': {'depth.name': 'mixture_of_depths', 'depth.layers': '1:', 'depth.capacity': 0.6},
}


@pytest.fixture(scope='module')
def decoder_of(tiny_config):
  @functools.cache
  def build(name):
    fields = {'model.layers': LAYERS, 'data.context': CONTEXT} | CASES[name]
    model = lm.from_config(tiny_config(**fields), vocab=VOCAB)
    return Decoder(model, random_variables(model))

  return build


@functools.cache
def speculation(decoder, draft, exit_layer):
  return SelfSpeculation(decoder, draft, exit_layer)


def best_logits(decoder, text, prompt):
  """Of one pass over the whole text, the logits that chose each token behind the prompt."""
  run = jax.jit(lambda v, t: decoder.model.apply(v, t, mode='decode'))
  padded = np.zeros((1, CONTEXT), np.int32)
  padded[0, : len(text)] = text
  return np.asarray(run(decoder.variables, padded))[0, prompt - 1 : len(text) - 1]


@pytest.mark.parametrize(
  ('name', 'draft', 'exit_layer'),
  [
    ('plain', 7, 2),
    ('window', 4, 1),
    ('depth', 3, 1),
    pytest.param('plain', 1, 1, marks=pytest.mark.slow),
    pytest.param('topk_keys', 4, 2, marks=pytest.mark.slow),
  ],
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 8), data=st.data())
def test_speculative_text_equals_plain_decoding(
  name, draft, exit_layer, seed, length, data, decoder_of
):
  decoder = decoder_of(name)
  prompt = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)
  tokens = data.draw(st.integers(1, CONTEXT - length))
  want = [int(one[0]) for one in decoder.generate([prompt], tokens, GREEDY)]
  own = speculation(decoder, draft, exit_layer)
  before = own.counts.accepted + own.counts.rounds
  found = list(own.generate(prompt, tokens))
  assert len(found) == tokens
  assert own.counts.accepted + own.counts.rounds - before <= tokens + draft
  if found != want:
    first = next(i for i in range(tokens) if found[i] != want[i])
    logits = np.sort(best_logits(decoder, [*prompt, *want], length)[first])
    assert logits[-1] - logits[-2] < CLOSE


def test_drafts_are_accepted_where_the_other_layers_add_nothing(decoder_of):
  """The exit's text is the model's then, and every draft is kept; with other layers not every one is."""
  decoder, prompt = decoder_of('plain'), np.array([1, 2, 3], np.int32)
  params = dict(decoder.variables['params'])
  silent = jax.tree.map(np.zeros_like, params['block_2'])
  same = Decoder(decoder.model, {'params': params | {'block_2': silent}})
  for one, every in ((same, True), (decoder, False)):
    own = SelfSpeculation(one, 4, 2)
    made = list(own.generate(prompt, 21))
    counts = own.counts
    assert counts.drafted == 4 * counts.rounds
    assert (counts.accepted == counts.drafted) == every
    assert counts.rounds == 4 or not every  # 20 tokens behind the prompt's own, five a round
    assert made == [int(t[0]) for t in one.generate([prompt], 21, GREEDY)]
  assert 'drafts accepted' in str(counts)


def test_tokens_with_close_logits_are_counted(decoder_of):
  decoder = decoder_of('plain')
  params = jax.tree.map(np.array, decoder.variables['params'])
  kernel = params['embed']['head']['kernel']
  kernel[:, 1::2] = kernel[:, :-1:2]  # every token has a twin, but the last one
  twins = Decoder(decoder.model, {'params': params})
  own = SelfSpeculation(twins, 4, 1)
  made = list(own.generate(np.array([1, 2], np.int32), 21))
  assert own.counts.close == sum(token < VOCAB - 1 for token in made[1:]) > 0
  assert all(token % 2 == 0 for token in made)


def test_the_cache_holds_the_text_after_every_round(decoder_of):
  """Of the tokens that were made, all but the newest, which no layer has seen."""
  decoder = decoder_of('plain')
  own, prompt = SelfSpeculation(decoder, 4, 1), np.array([5, 6, 7], np.int32)
  logits, cache, place_B = decoder.begin([prompt], 5)
  token_B = np.asarray(logits.argmax(-1), np.int32)
  for _ in range(3):
    row, accepted, _, cache = own.round(decoder.variables, cache, token_B, place_B)
    place_B = place_B + int(accepted[0]) + 1
    token_B = np.asarray(row[:, int(accepted[0])])
    lengths = {int(cache[layer]['attention'][LENGTH][0]) for layer in cache}
    assert lengths == {int(place_B[0])}


CARRIES = '''
  """A stack that carries more than the residual stream."""

  from sparse_lm.layers.method import LayerMethod, Traits


  class Carries(LayerMethod):
    @property
    def traits(self):
      return Traits(paper='a test', saves='nothing')

    def __call__(self, layers, tokens, mode):
      return tokens.x
'''


def test_models_and_options_that_cannot_speculate_are_named(decoder_of, method, tiny_config):
  decoder, prompt = decoder_of('plain'), np.ones(5, np.int32)
  for draft, exit_layer, said in (
    (0, 0, '--speculate=0 is not valid; valid: 1 to 31'),
    (CONTEXT, 0, f'--speculate={CONTEXT} is not valid; valid: 1 to 31'),
    (4, LAYERS, f'--exit_layer={LAYERS} is not valid; valid: 1 to {LAYERS - 1}'),
    (4, -1, '--exit_layer=-1 is not valid'),
  ):
    with pytest.raises(UserError, match=said):
      SelfSpeculation(decoder, draft, exit_layer)
  with pytest.raises(
    UserError, match='--speculate=27 is not valid; valid: 1 to 26 after a prompt of 5'
  ):
    next(SelfSpeculation(decoder, CONTEXT - 5).generate(prompt, 3))
  single = lm.from_config(tiny_config(), VOCAB)
  with pytest.raises(
    UserError, match='--exit_layer=0 is not valid; valid: none, for a model with one layer'
  ):
    SelfSpeculation(Decoder(single, {}))
  with pytest.raises(UserError, match='--speculate=1 is not valid; valid: 0 after a prompt of 31'):
    next(SelfSpeculation(decoder, 1).generate(np.ones(CONTEXT - 1, np.int32), 1))
  bigrams = lm.from_config(tiny_config(model__layers=2, model__bigram=True), VOCAB)
  with pytest.raises(UserError, match=r'config\.model\.bigram=True is not valid; valid: False'):
    SelfSpeculation(Decoder(bigrams, {}))
  method('stack', 'carries', CARRIES)
  model = lm.from_config(tiny_config(model__layers=2, stack__name='carries'), VOCAB)
  with pytest.raises(
    UserError, match=r"config.stack.name='carries' passes more than .* in two parts"
  ):
    SelfSpeculation(Decoder(model, {}))


@pytest.mark.slow
def test_the_command_speculates_and_prints_statistics(tiny_config, tmp_path, call):
  config = tiny_config(stack__name='layer_skip', model__layers=2, train__steps=4, data__context=32)
  train(config, str(tmp_path / 'run'), progress=False)
  given = [f'--workdir={tmp_path / "run"}', '--prompt=the', '--temperature=0', '--tokens=20']
  code, plain, _ = call(generate, given)
  assert code == 0
  code, text, errors = call(generate, [*given, '--speculate=3', '--exit_layer=1'])
  assert (code, text) == (0, plain)
  assert 'drafts accepted' in errors and 'tokens per verification' in errors
  for more, said in (
    (['--temperature=1'], '--temperature with --speculate=1.0 is not valid; valid: 0 (greedy)'),
    (['--prompt=a'], 'number of --prompt with --speculate=2 is not valid; valid: 1'),
    (['--exit_layer=2'], '--exit_layer=2 is not valid; valid: 1 to 1'),
    (['--speculate=31'], 'valid: 1 to 28 after a prompt of 3'),
  ):
    code, text, errors = call(generate, [*given, '--speculate=3', *more])
    assert code == 2 and text == '' and said in errors and errors.count('\n') == 1
