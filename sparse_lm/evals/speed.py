"""How fast a packed model prefills and decodes beside its dense twin, in turns in one process."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.pack import PackedModel, kept_weights, weights
from sparse_lm.inference.reading import read_bytes
from sparse_lm.inference.workload import DECODED, DecodeCall, PrefillCall, Workload, workload
from sparse_lm.measure import machine, turns

ROLES = ('', 'dense_')  # before the names of numbers: of the packed model, and of its twin


@dataclasses.dataclass(frozen=True)
class Speed(Evaluation):
  """Times a packed model and its twin on real text, because it decides which gates open.

  Attributes:
    repeats: turns.
    what: 'decode', 'prefill', or both.
  """

  repeats: int = 15
  what: tuple[str, ...] = ('decode', 'prefill')

  def run(self, model: EvalModel, data: EvalData) -> Values:
    """The numbers of one model; see `compare`."""
    return self.compare({'': model}, data)['']

  def compare(self, models: Mapping[str, EvalModel], data: EvalData) -> dict[str, Values]:
    """Numbers of each packed model and its twin, all timed in turns.

    Returns:
      By name `decode_ms` (of a token of every sequence), `prefill_tokens_per_second`, `peak_memory`
      (bytes), `weights_bytes`, `kept_weights` (share of the kernels' weights that packing left: units
      that masks disconnect are removed), `read_bytes` (of weights that a token reads, gates as measured
      on the text; of batch 1 only), `cache_bytes` (of keys, values and what else is kept of its sequence
      that a token reads), `bandwidth` (of the weights, over the machine's measured one), the same
      with `dense_` before it, and `decode_speedup`, `prefill_speedup` with `_low` and `_high`, their
      quartiles over the turns.

    Raises:
      UserError: too little text, a context that is too short, or a model that is not packed.
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
      'speed is measured of a packed model beside its twin; valid: one that is packed'
    )
  return model.packed, model.twin


def _sizes(packed: PackedModel) -> Values:
  return {'weights_bytes': weights(packed.variables), 'kept_weights': kept_weights(packed)}


def _decoding(
  packed: PackedModel, call: DecodeCall, work: Workload, step: float, bandwidth: float
) -> Values:
  """Numbers of decoding: `step` is in seconds a token, `bandwidth` in bytes a second."""
  # Side by side, sequences share what they read.
  found = read_bytes(packed, work.tokens_BxL)
  read = found.weights if work.batch == 1 else None
  return {
    'decode_ms': 1e3 * step,
    'peak_memory': call.peak_memory,
    'read_bytes': read,
    'cache_bytes': found.cache,
    'bandwidth': None if read is None else read / step / bandwidth,
  }
