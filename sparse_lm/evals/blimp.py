"""Measures how often the grammatical sentence of a minimal pair is likelier than the other one.

Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English".
"""

import collections
import dataclasses
import gzip
import hashlib
import json
import pathlib
import zlib

import numpy as np

from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import Range
from sparse_lm.core.records import JsonObject
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values, option
from sparse_lm.inference.likelihood import beginning, likelihoods

_KEYS = ('task', 'field', 'good', 'bad')
_VALID = (
  'valid: a file of JSON lines with the texts task, field, good and bad (.jsonl or .jsonl.gz), as BLiMP '
  'publishes them'
)


@dataclasses.dataclass(frozen=True)
class Blimp(Evaluation):
  """Computes the share of minimal pairs whose good sentence has the larger log-probability.

  The tokens of a sentence follow the token that begins a text (see `likelihood.beginning`), and the
  log-probability of the sentence is the sum over its tokens. Chance is 0.5, and a pair counts as wrong if
  both log-probabilities are equal. The metrics are `blimp` (mean over all tasks), `blimp/<field>` (mean
  over the tasks of a field of linguistics) and `blimp/<field>/<task>`.

  Attributes:
    pairs_file: path of the pairs, JSON lines, which may be compressed by gzip.
    pairs: number of pairs of each task, from the beginning of the file; 0 = all.
  """

  reads_text = False

  pairs_file: str = option('', 'file of minimal pairs, such as blimp.jsonl.gz')
  pairs: int = option(0, 'pairs of each task; default 0: all', Range(int, '[0, 2^31)'))

  def run(self, model: EvalModel, data: EvalData) -> Values:
    """Returns the metrics of the class.

    Raises UserError if the file is missing or damaged, or if a sentence does not fit the model's context
    or tokenizer.
    """
    tokenizer = _tokenizer(model)
    pairs = self._read()[0]
    begin, _ = beginning(tokenizer)
    sentences = [np.concatenate([begin, tokenizer.encode(text)]) for p in pairs for text in p[2:]]
    label = 'pairs' if data.progress else ''
    found = likelihoods(model.model, model.variables, sentences, data.batch, label)
    sums = np.array([float(np.sum(each.log_p, dtype=np.float64)) for each in found]).reshape(-1, 2)
    right: dict[tuple[str, str], list[bool]] = collections.defaultdict(list)
    for (task, field, *_), (good, bad) in zip(pairs, sums):
      right[field, task].append(bool(good > bad))
    tasks = {key: float(np.mean(each)) for key, each in sorted(right.items())}
    fields = sorted({field for field, _ in tasks})
    values: Values = {'blimp': float(np.mean(list(tasks.values())))}
    for field in fields:
      values[f'blimp/{field}'] = float(np.mean([x for key, x in tasks.items() if key[0] == field]))
    return values | {f'blimp/{field}/{task}': x for (field, task), x in tasks.items()}

  def card(self, model: EvalModel, data: EvalData) -> JsonObject:
    """Returns the file's hash, the numbers of pairs and tasks, the name of the first token, the unit."""
    tokenizer = _tokenizer(model)
    pairs, digest = self._read()
    return {
      'data_sha256': digest,
      'pairs': len(pairs),
      'tasks': len({task for task, *_ in pairs}),
      'begins_with': beginning(tokenizer)[1],
      'tokenizer_sha256': tokenizer.digest,
      'unit': 'share of pairs whose good sentence is likelier',
    }

  def _read(self) -> tuple[list[tuple[str, str, str, str]], str]:
    """Returns the pairs `(task, field, good, bad)`, at most `pairs` of each task, and the file's hash."""
    if not self.pairs_file:
      raise UserError(f"--pairs_file='' names no file; {_VALID}")
    pairs, digest = _read(self.pairs_file)
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    for pair in pairs:
      counts[pair[0]] += 1
      if not self.pairs or counts[pair[0]] <= self.pairs:
        kept.append(pair)
    return kept, digest


def _tokenizer(model: EvalModel) -> Tokenizer:
  if model.tokenizer is None:
    raise UserError('sentences need a tokenizer; valid: a model that reads text')
  return model.tokenizer


def _read(file: str) -> tuple[list[tuple[str, str, str, str]], str]:
  """Returns all pairs of a file, and the hash of its uncompressed bytes."""
  try:
    raw = pathlib.Path(file).expanduser().read_bytes()
    text = gzip.decompress(raw) if raw.startswith(b'\x1f\x8b') else raw
    rows = [json.loads(line) for line in text.decode().splitlines() if line.strip()]
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise UserError(f'--pairs_file={file!r} cannot be read ({error}); {_VALID}') from None
  for number, row in enumerate(rows, start=1):
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in _KEYS):
      raise UserError(f'--pairs_file={file!r}: pair {number} lacks a text; {_VALID}')
  if not rows:
    raise UserError(f'--pairs_file={file!r} holds no pair; {_VALID}')
  # BLiMP writes one field both as syntax/semantics and as syntax_semantics.
  rows = [row | {'field': row['field'].replace('/', '_')} for row in rows]
  return [tuple(row[key] for key in _KEYS) for row in rows], hashlib.sha256(text).hexdigest()
