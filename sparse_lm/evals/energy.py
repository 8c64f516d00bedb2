"""Measures the energy per decoded token."""

import dataclasses

import jax

from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.workload import DECODED, DecodeCall, workload
from sparse_lm.measure import energy


@dataclasses.dataclass(frozen=True)
class Energy(Evaluation):
  """Measures `joules_per_token` of the whole device while it decodes real text; `None` without a meter.

  Attributes:
    repeats: number of measured turns of a few tokens each, after one turn for compilation.
  """

  repeats: int = 15

  def run(self, model: EvalModel, data: EvalData) -> Values:
    """Returns `joules_per_token`. Raises UserError for too short a text or a model that cannot decode."""
    work = workload(data.tokens, data.context, data.batch)
    call = DecodeCall(Decoder(model.model, model.variables), work)
    jax.block_until_ready(call())
    with energy.meter() as measured:
      for _ in range(self.repeats):
        jax.block_until_ready(call.prepare())
        jax.block_until_ready(call())
    tokens = self.repeats * DECODED * work.batch
    joules = measured.joules
    return {'joules_per_token': None if joules is None else joules / tokens}
