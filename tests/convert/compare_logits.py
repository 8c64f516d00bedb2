"""Compares the logits of a converted model with those of the library transformers.

The first command runs where torch and transformers are installed (`pip install -e '.[oracle]'`). FROM is
a .gguf file, which transformers reads by itself, or a folder of Hugging Face:

    python tests/convert/compare_logits.py reference FROM logits.npz
    python -m sparse_lm.convert --from=FROM --out=WORKDIR
    python tests/convert/compare_logits.py compare WORKDIR logits.npz

It fails if the largest difference is above 1e-4 of the largest logit, or if the text after "The capital
of France is" is not the same.
"""

import pathlib
import sys

import numpy as np

PROMPT = 'The capital of France is'
LENGTH, NEW = 64, 8  # tokens whose logits are compared, and greedy tokens
LIMIT = 1e-4


def reference(source, out):
  """Writes logits and greedy text of transformers."""
  import torch
  import transformers

  path = pathlib.Path(source)
  place = (path.parent, {'gguf_file': path.name}) if path.suffix == '.gguf' else (path, {})
  model = transformers.AutoModelForCausalLM.from_pretrained(
    place[0], dtype=torch.float32, attn_implementation='eager', **place[1]
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(place[0], **place[1])
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, LENGTH))
  prompt = tokenizer(PROMPT, return_tensors='pt').input_ids
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
    made = model.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :]
  text = tokenizer.decode(made)
  np.savez(out, tokens=tokens, logits=logits, prompt=prompt.numpy(), text=text)
  print(f'{PROMPT}{text}')


def compare(workdir, stored):
  """Prints the largest difference and the greedy text of this project."""
  import sparse_lm

  want, run = np.load(stored), sparse_lm.load(workdir)
  error = np.abs(run.logits(want['tokens'].astype(np.int32)) - want['logits']).max()
  error /= np.abs(want['logits']).max()
  text = run.generate(PROMPT, max_new_tokens=NEW, temperature=0)
  print(f'{error:.1e} of the largest logit; {PROMPT}{text}')
  if not error <= LIMIT or run.tokens(PROMPT).tolist() != want['prompt'].tolist():
    sys.exit('the logits or the tokens differ')
  if not str(want['text']).startswith(text):
    sys.exit(f'transformers continues {str(want["text"])!r}')


if __name__ == '__main__':
  {'reference': reference, 'compare': compare}[sys.argv[1]](*sys.argv[2:])
