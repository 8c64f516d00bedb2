"""Times prefill and decoding of packed models and their dense twins, in turns in one process."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.pack import PackedModel, kept_weights, total_bytes
from sparse_lm.inference.reading import read_bytes
from sparse_lm.inference.workload import DECODED, DecodeCall, PrefillCall, Workload, workload
from sparse_lm.measure import machine, turns

ROLES = ('', 'dense_')  # prefixes of metrics of the packed model and of its dense twin


@dataclasses.dataclass(frozen=True)
class Speed(Evaluation):
  """Times a packed model and its dense twin on real text, because the text decides which gates open.

  Attributes:
    repeats: number of measured turns.
    what: what to time: 'decode', 'prefill' or both.
  """

  repeats: int = 15
  what: tuple[str, ...] = ('decode', 'prefill')

  def run(self, model: EvalModel, data: EvalData) -> Values:
    """Returns the metrics of one model (see `compare`)."""
    return self.compare({'': model}, data)['']

  def compare(self, models: Mapping[str, EvalModel], data: EvalData) -> dict[str, Values]:
    """Times all packed models and their twins in turns; returns the metrics of each model by name.

    - `decode_ms`: milliseconds per step, which decodes one token of every sequence.
    - `prefill_tokens_per_second`: tokens per second of prefill.
    - `peak_memory`: peak memory of decoding, in bytes.
    - `weights_bytes`: bytes of the stored weights.
    - `kept_weights`: fraction of the kernels' weights that are kept. Packing also removes units that
      masks disconnect.
    - `read_bytes`: bytes of weights that are read to decode one token, with the gates as measured on the
      text; only for batch 1.
    - `cache_bytes`: bytes that are read from the cache to decode one token.
    - `bandwidth`: bandwidth of reading weights, as a fraction of the machine's measured bandwidth.

    The twin has the same metrics with the prefix `dense_`. `decode_speedup` and `prefill_speedup` are
    medians over turns; `_low` and `_high` are their quartiles.

    Raises:
      UserError: there is too little text, the context is too short, or a model is not packed.
    """
    work = workload(data.tokens, data.context, data.batch)
    pairs = {name: _pair(model) for name, model in models.items()}
    kinds = {'decode': DecodeCall, 'prefill': PrefillCall}
    calls = {
      (what, name, role): kinds[what](Decoder(packed.model, packed.variables), work)
      for what in self.what
      for name, pair in pairs.items()
      for role, packed in zip(ROLES, pair)
    }
    reading, bytes_ = machine.read()
    timed: dict[tuple[str, str, str], Callable[[], Tree]] = calls | {('read', '', ''): reading}
    seconds = turns.interleaved(timed, self.repeats, 'decoding')
    bandwidth = bytes_ / float(np.median(seconds['read', '', '']))
    found = {}
    for name, pair in pairs.items():
      row: Values = {'memory_bandwidth': bandwidth}
      for role, packed in zip(ROLES, pair):
        times = {what: float(np.median(seconds[what, name, role])) for what in self.what}
        row |= {f'{role}{key}': value for key, value in _sizes(packed).items()}
        if 'prefill' in times:
          row[f'{role}prefill_tokens_per_second'] = work.tokens_BxL.size / times['prefill']
        if 'decode' in times:
          call = calls['decode', name, role]
          numbers = _decoding(packed, call, work, times['decode'] / DECODED, bandwidth)
          row |= {f'{role}{key}': value for key, value in numbers.items()}
      for what in self.what:
        ratio = turns.ratio(seconds[what, name, 'dense_'], seconds[what, name, ''])
        row |= {f'{what}_{key.replace("ratio", "speedup")}': value for key, value in ratio.items()}
      found[name] = row
    return found


def _pair(model: EvalModel) -> tuple[PackedModel, PackedModel]:
  if model.packed is None or model.twin is None:
    raise UserError(
      'the evaluation speed compares a packed model with its dense twin; valid: a packed model'
    )
  return model.packed, model.twin


def _sizes(packed: PackedModel) -> Values:
  return {'weights_bytes': total_bytes(packed.variables), 'kept_weights': kept_weights(packed)}


def _decoding(
  packed: PackedModel, call: DecodeCall, work: Workload, step: float, bandwidth: float
) -> Values:
  """Returns metrics of decoding, given seconds per step and the machine's bytes per second."""
  # Sequences of a batch share the weights that they read.
  found = read_bytes(packed, work.tokens_BxL)
  read = found.weights if work.batch == 1 else None
  return {
    'decode_ms': 1e3 * step,
    'peak_memory': call.peak_memory,
    'read_bytes': read,
    'cache_bytes': found.cache,
    'bandwidth': None if read is None else read / step / bandwidth,
  }
