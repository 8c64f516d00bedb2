"""Writes small random models of every family with the library transformers, and their logits.

Run it where torch and transformers are installed (`pip install -e '.[oracle]'`):

    python tests/convert/oracle.py tests/convert/models

`test_families.py` compares with what it wrote, so tests need neither library. With a second folder, it
compares the models in that folder, which `sparse_lm.convert --to=hf` wrote under the same names,
with the stored logits.
"""

import pathlib
import shutil
import sys

import numpy as np
import tokenizers
import torch
import transformers

VOCAB = 61
SHARED = {'vocab_size': VOCAB, 'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': None}
# Awkward sizes: 6 heads of width 6 over a width of 24.
LLAMA = SHARED | {
  'hidden_size': 24,
  'intermediate_size': 26,
  'num_hidden_layers': 2,
  'num_attention_heads': 6,
  'num_key_value_heads': 3,
  'head_dim': 6,
  'max_position_embeddings': 40,
  'rms_norm_eps': 3e-4,
}
THETA = {'rope_type': 'default', 'rope_theta': 500.0}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 1000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 10_000.0, 'factor': 2.5}
GPT2 = SHARED | {'n_embd': 20, 'n_layer': 2, 'n_head': 5, 'n_positions': 24, 'n_inner': 26}
NEOX = SHARED | {
  'hidden_size': 24,
  'intermediate_size': 26,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'max_position_embeddings': 40,
  'layer_norm_eps': 2e-4,
}
SOME_ROTATED = {'rope_type': 'default', 'rope_theta': 700.0, 'partial_rotary_factor': 0.5}
EXPERTS = {'num_experts_per_tok': 2}
# By the name of the folder: the name of the family's classes, and its config.
MODELS = {
  'gpt2': ('GPT2', GPT2),
  'llama3': ('Llama', LLAMA | {'rope_parameters': LLAMA3}),
  'llama_biased': (
    'Llama',
    LLAMA | {'rope_parameters': LINEAR, 'attention_bias': True, 'tie_word_embeddings': True},
  ),
  'qwen2': ('Qwen2', LLAMA | {'rope_parameters': THETA}),
  'qwen3': ('Qwen3', LLAMA | {'rope_parameters': THETA, 'tie_word_embeddings': True}),
  'pythia': ('GPTNeoX', NEOX | {'rope_parameters': SOME_ROTATED}),
  'neox_serial': (
    'GPTNeoX',
    NEOX
    | {'rope_parameters': SOME_ROTATED, 'use_parallel_residual': False, 'attention_bias': False},
  ),
  'olmoe': (
    'Olmoe',
    {name: value for name, value in LLAMA.items() if name != 'head_dim'}
    | EXPERTS
    | {'num_experts': 5, 'norm_topk_prob': False, 'rope_parameters': THETA},
  ),
  'mixtral': ('Mixtral', LLAMA | EXPERTS | {'num_local_experts': 5, 'rope_parameters': THETA}),
}
BFLOAT16, SHARDED = 'qwen2', 'qwen3'  # saved in this dtype, and in several files


def randomise(model):
  """Draws all parameters, larger than at initialisation, so that each of them changes the logits."""
  generator = torch.Generator().manual_seed(0)
  for name, parameter in model.named_parameters():
    draw = torch.randn(parameter.shape, generator=generator)
    norm = 'norm' in name or '.ln_' in name
    fan = parameter.shape[-1] if parameter.ndim > 1 else 1
    scale = 0.3 if parameter.ndim < 2 else 1.5 * fan**-0.5
    centre = 1.0 if norm and name.endswith('weight') else 0.0
    parameter.data = centre + scale * draw


def tokenizer():
  """A tokenizer of as many words as the models have rows."""
  words = {'<s>': 0, '</s>': 1, **{f'w{i}': i for i in range(2, VOCAB)}}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='w2'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, bos_token='<s>', eos_token='</s>'
  )


def loaded(name, folder):
  """The model in a folder, computing in float32."""
  kind = _class(name, 'LMHeadModel' if MODELS[name][0] == 'GPT2' else 'ForCausalLM')
  model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager')
  if 'num_experts_per_tok' in MODELS[name][1]:
    model.set_experts_implementation('eager')  # the other ones need widths that divide by 4
  return model


def logits_of(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def _class(name, kind):
  return getattr(transformers, MODELS[name][0] + kind)


def write(name, folder):
  config = _class(name, 'Config')(**MODELS[name][1])
  model = _class(name, 'LMHeadModel' if MODELS[name][0] == 'GPT2' else 'ForCausalLM')(config).eval()
  randomise(model)
  if name == BFLOAT16:
    model = model.to(torch.bfloat16)
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder, max_shard_size='9KB' if name == SHARDED else '1GB')
  tokenizer().save_pretrained(folder)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 24)).astype(np.int32)
  np.savez(folder / 'logits.npz', tokens=tokens, logits=logits_of(loaded(name, folder), tokens))


def check(name, folder, stored):
  found = np.load(stored / 'logits.npz')
  error = np.abs(logits_of(loaded(name, folder), found['tokens']) - found['logits']).max()
  print(f'{name}: {error / np.abs(found["logits"]).max():.1e} of the largest logit')
  assert error <= 1e-5 * np.abs(found['logits']).max(), name
  transformers.AutoTokenizer.from_pretrained(folder)


if __name__ == '__main__':
  models, *written = map(pathlib.Path, sys.argv[1:])
  for one in MODELS:
    if written:
      check(one, written[0] / one, models / one)
    else:
      write(one, models / one)
