"""Runs benchmarks of the Language Model Evaluation Harness (Gao et al.), with its prompts and metrics."""

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import Range
from sparse_lm.core.records import JsonObject
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.evals import EvalData, EvalModel, Evaluation, Values, option
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.likelihood import beginning, likelihoods
from sparse_lm.inference.sample import Sampling

if TYPE_CHECKING:
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM

_NEW_TOKENS = 256  # the harness's own default for generated text


@dataclasses.dataclass(frozen=True)
class LmEval(Evaluation):
  """Runs tasks of lm-eval. Its metrics are `lm_eval/<task>/<metric>`.

  The token of `likelihood.beginning` is put before a text that has no context, and before no other text.
  No chat template is applied. If a context is too long, its first tokens are left out. The harness may
  download the data of a task.

  Attributes:
    benchmarks: names of tasks or paths of their YAML files, separated by commas.
    limit: number of examples of each task; 0 = all.
  """

  reads_text = False

  benchmarks: str = option('', 'names of tasks, such as arc_easy,hellaswag, or their YAML files')
  limit: int = option(0, 'examples of each task; default 0: all', Range(int, '[0, 2^31)'))

  def run(self, model: EvalModel, data: EvalData) -> Values:
    """Returns the metrics of the class. Raises UserError without the package, and for unknown tasks."""
    if not self.benchmarks:
      raise UserError("--benchmarks='' names no task; valid: names such as arc_easy,hellaswag")
    harness = _library()
    scorer = _Scorer(model, data)
    tasks = [name.strip() for name in self.benchmarks.split(',')]
    try:
      found = harness.simple_evaluate(
        _adapter(scorer), tasks=tasks, limit=self.limit or None, log_samples=False
      )
    except (
      KeyError,
      ValueError,
      OSError,
    ) as error:  # an unknown task, or data that cannot be loaded
      reason = (str(error).strip().splitlines() or [repr(error)])[0]
      raise UserError(
        f'--benchmarks={self.benchmarks!r} cannot run ({reason}); valid: tasks of lm-eval whose data are '
        'here or can be downloaded'
      ) from error
    return {
      f'lm_eval/{task}/{name.removesuffix(",none")}': float(value)
      for task, metrics in found['results'].items()
      for name, value in metrics.items()
      if isinstance(value, int | float | np.number)
    }

  def card(self, model: EvalModel, data: EvalData) -> JsonObject:
    """Returns the version of the harness, the tasks, and the name of the token that begins a text."""
    return {
      'lm_eval': _library().__version__,
      'benchmarks': self.benchmarks,
      'limit': self.limit,
      'begins_with': beginning(model.tokenizer)[1],
      'tokenizer_sha256': model.tokenizer.digest,
    }


class _Scorer:
  """Answers the requests of the harness: log-likelihoods and continuations.

  Raises UserError if the model has no tokenizer, or its tokenizer no token that begins a text.
  """

  def __init__(self, model: EvalModel, data: EvalData) -> None:
    if model.tokenizer is None or not len(beginning(model.tokenizer)[0]):
      raise UserError(
        'benchmarks need a token that begins a text; valid: a tokenizer with one, such as bytes'
      )
    self.tokenizer: Tokenizer = model.tokenizer
    self.begin = int(beginning(model.tokenizer)[0][0])
    self.context = model.model.spec.context
    self._model, self._data = model, data

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text, without special tokens."""
    return self.tokenizer.encode(text).tolist()

  def likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Returns each continuation's log-probability, and whether each of its tokens is the likeliest."""
    sequences = [np.array((before + after)[-self.context - 1 :]) for before, after in pairs]
    for _, after in pairs:
      if len(after) > self.context:
        raise UserError(
          f'a continuation has {len(after)} tokens; valid: up to {self.context}, the context'
        )
    label = 'requests' if self._data.progress else ''
    model = self._model
    found = likelihoods(model.model, model.variables, sequences, self._data.batch, label)
    return [
      (float(each.log_p[-len(after) :].sum()), bool(each.likeliest[-len(after) :].all()))
      for each, (_, after) in zip(found, pairs)
    ]

  def continuations(self, requests: Sequence[tuple[str, dict]]) -> list[str]:
    """Returns a continuation of each prompt, which ends before the first stop text."""
    return [self._continuation(prompt, dict(options)) for prompt, options in requests]

  def _continuation(self, prompt: str, options: dict) -> str:
    until = options.get('until') or []
    stops = [until] if isinstance(until, str) else list(until)
    tokens = min(options.get('max_gen_toks', _NEW_TOKENS), self.context - 1)
    temperature = options.get('temperature', 1.0) if options.get('do_sample') else 0.0
    given = np.array(self.encode(prompt) or [self.begin])[-(self.context - tokens) :]
    made: list[int] = []
    for token_B in self._decoder.generate([given], tokens, Sampling(temperature)):
      if token_B[0] == self.tokenizer.eos:
        break
      made.append(int(token_B[0]))
      text = self.tokenizer.decode(made)
      if any(stop in text for stop in stops):
        break
    text = self.tokenizer.decode(made)
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

  @functools.cached_property
  def _decoder(self) -> Decoder:
    return Decoder(self._model.model, self._model.variables)


def _adapter(scorer: _Scorer) -> 'TemplateLM':
  """Returns a model of the harness that calls a scorer. The harness must be installed."""
  from lm_eval.api.model import TemplateLM
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

  class Adapter(TemplateLM):
    @property
    def eot_token_id(self) -> int:
      return scorer.begin

    def tok_encode(
      self, string: str, add_special_tokens: bool | None = None, **options: bool
    ) -> list[int]:
      return scorer.encode(string)

    def _loglikelihood_tokens(
      self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: bool
    ) -> list[tuple[float, bool]]:
      return scorer.likelihoods([(before, after) for _, before, after in requests])

    def loglikelihood_rolling(
      self, requests: list['Instance'], disable_tqdm: bool = False
    ) -> list[float]:
      sums = []
      for (text,) in (request.args for request in requests):
        windows = get_rolling_token_windows(scorer.encode(text), scorer.begin, scorer.context, 1)
        found = scorer.likelihoods(list(map(make_disjoint_window, windows)))
        sums.append(sum(log_p for log_p, _ in found))
      return sums

    def generate_until(self, requests: list['Instance'], disable_tqdm: bool = False) -> list[str]:
      return scorer.continuations([request.args for request in requests])

  return Adapter()


def _library() -> types.ModuleType:
  try:
    import lm_eval
    from lm_eval import evaluator  # noqa: F401, gives the library `simple_evaluate`
  except ImportError:
    raise UserError(
      "--task=lm_eval needs a package; valid: pip install 'lm_eval>=0.4.13'"
    ) from None
  return lm_eval
