"""Perplexity and minimal pairs of a Hugging Face model by PyTorch, to compare `sparse_lm.evaluate` with.

It needs the packages of the extra `oracle`, and shares no code with this project:

  python tests/evals/transformers_oracle.py FOLDER --text=FILE --context=256 --max_tokens=24576
  python tests/evals/transformers_oracle.py FOLDER --pairs_file=blimp.jsonl.gz --pairs=20
"""

import argparse
import collections
import gzip
import json
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('folder')
  parser.add_argument('--text')
  parser.add_argument('--context', type=int, default=256)
  parser.add_argument('--stride', type=int)
  parser.add_argument('--max_tokens', type=int)
  parser.add_argument('--pairs_file')
  parser.add_argument('--pairs', type=int, default=20)
  given = parser.parse_args()
  tokenizer = AutoTokenizer.from_pretrained(given.folder)
  model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).eval()
  with torch.no_grad():
    if given.text:
      print(json.dumps(perplexity(model, tokenizer, given), indent=2))
    if given.pairs_file:
      print(json.dumps(minimal_pairs(model, tokenizer, given), indent=2))


def perplexity(model, tokenizer, given):
  """Each window predicts what no earlier window has predicted."""
  with open(given.text, encoding='utf-8') as file:
    ids = tokenizer(file.read(), add_special_tokens=False)['input_ids'][: given.max_tokens]
  stride, done, nats = given.stride or given.context, 0, 0.0
  for begin in range(0, len(ids) - 1, stride):
    end = min(begin + given.context, len(ids) - 1)
    if end <= done:
      break
    log_p = torch.log_softmax(model(torch.tensor([ids[begin:end]])).logits[0].double(), -1)
    targets = torch.tensor(ids[done + 1 : end + 1])
    nats -= log_p[done - begin :].gather(-1, targets[:, None]).sum().item()
    done = end
  loss = nats / (len(ids) - 1)
  return {'predictions': len(ids) - 1, 'loss': loss, 'perplexity': math.exp(loss)}


def minimal_pairs(model, tokenizer, given):
  """Sentences follow the token that begins texts, one sentence at a time."""
  with gzip.open(given.pairs_file, 'rt', encoding='utf-8') as file:
    rows = list(map(json.loads, file))
  right = collections.defaultdict(list)
  for row in rows:
    if len(right[row['task']]) < given.pairs:
      good, bad = (log_p(model, tokenizer, row[key]) for key in ('good', 'bad'))
      right[row['task']].append(good > bad)
  tasks = {task: sum(each) / len(each) for task, each in right.items()}
  return {'blimp': sum(tasks.values()) / len(tasks), 'tasks': tasks}


def log_p(model, tokenizer, text):
  begin = tokenizer.bos_token_id
  begin = tokenizer.eos_token_id if begin is None else begin
  ids = [begin, *tokenizer(text, add_special_tokens=False)['input_ids']]
  logits = model(torch.tensor([ids[:-1]])).logits[0].double()
  return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()


if __name__ == '__main__':
  main()
