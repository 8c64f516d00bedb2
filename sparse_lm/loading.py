"""The public Python interface: `run = sparse_lm.load(path)`.

A `Run` is the model of a workdir or of a packed folder, with everything that an analysis needs::

    run = sparse_lm.load('results/rigl')
    run.logits('def __init__(')                              # [1, tokens, vocabulary]
    run.generate('def ', max_new_tokens=40, temperature=0.8)
    run.activations('def ', sites='block_*/mlp/hidden')
    run.logits('def ', interventions={'block_0/mlp/output': jnp.zeros_like})
    run.evaluate(), run.masks, run.costs(), run.metrics, run.plot('val_loss')
"""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
import pandas as pd
from jax.stages import Wrapped
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from sparse_lm import evals
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.ranges import Range
from sparse_lm.core.tree import Tree
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.evals import Evaluation, Values, Windows
from sparse_lm.evals.loss import Loss
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.sample import TEMPERATURE, TOP_P, Sampling
from sparse_lm.layers.spec import NO_REMAT
from sparse_lm.model.lm import LM
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import record, sites
from sparse_lm.report import training_log
from sparse_lm.runs import runnable
from sparse_lm.runs.configs import Overrides
from sparse_lm.runs.run_folder import LOG
from sparse_lm.runs.runnable import Runnable
from sparse_lm.runs.trained import check_tokens

# What `Run` accepts as input: texts, or token ids.
Input = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array
# What becomes of the activation at a site: an array of the same shape and dtype.
Intervention = Callable[[jax.Array], jax.Array | np.ndarray]


def load(path: str | os.PathLike[str]) -> 'Run':
  """Loads a trained or packed model for analysis.

  Args:
    path: a workdir (its newest checkpoint), `<workdir>/best` (the checkpoint of lowest validation loss),
      or a packed folder.

  Raises:
    UserError: the folder holds neither a packed model nor a checkpoint, or one of its files is damaged.
  """
  if not isinstance(path, str | os.PathLike):
    raise UserError(
      f'path of type {type(path).__name__}; valid: the path of a workdir, of its best/, or of a packed '
      'folder'
    )
  return Run(runnable.load(os.fspath(path)))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Run:
  """A trained or packed model; see the module's docstring for examples.

  Methods take `x` as a text, a list of texts with equally many tokens, a list of token ids, or an integer
  array `[L]` or `[B, L]`. A single text or sequence is a batch of one. Results are NumPy arrays with a
  leading batch axis. Shapes: B batch, L tokens, V vocabulary.

  Attributes:
    loaded: the model, its variables and the folder's contents.
  """

  loaded: Runnable

  def __repr__(self) -> str:
    spec = self.model.spec
    count = sum(leaf.size for leaf in jax.tree.leaves(plan_of(self.model).params))
    kind = 'packed model' if self.loaded.packed else 'trained model'
    return (
      f'Run({self.path!r}: {kind}, step {self.step}, {spec.layers} layers of width {spec.width}, '
      f'{count:,} parameters, {self.tokenizer})'
    )

  @property
  def path(self) -> str:
    """The folder that the model was loaded from."""
    return self.loaded.path

  @property
  def source(self) -> str:
    """The folder and the checkpoint, in words."""
    return self.loaded.source

  @property
  def config(self) -> ConfigDict:
    """The run's config."""
    return self.loaded.config

  @property
  def tokenizer(self) -> Tokenizer:
    """The run's tokenizer: `encode(text)` and `decode(ids)`."""
    return self.loaded.tokenizer

  @property
  def step(self) -> int:
    """Optimizer steps that the checkpoint had completed."""
    return self.loaded.origin.step

  @property
  def model(self) -> LM:
    """The Flax module, for `model.apply(variables, tokens)`."""
    return self.loaded.model

  @property
  def variables(self) -> Tree:
    """All collections of variables that `model` reads."""
    return self.loaded.variables

  @property
  def params(self) -> Tree:
    """The nested parameters, with zeros for dropped weights; for a packed model, those before packing."""
    return self.loaded.origin.params

  @functools.cached_property
  def masks(self) -> dict[str, np.ndarray]:
    """Bool masks by the path of their parameter, True = kept. Parameters without a mask are left out.

    The masks of a packed model are True where a weight is not zero.
    """
    return tree.named(jax.device_get(self.loaded.origin.masks))

  def tokens(self, x: Input) -> np.ndarray:
    """Returns the token ids of `x`, int32 `[B, L]`.

    Raises UserError for other types, for texts of different lengths, for ids outside the vocabulary, and
    for sequences that are empty or longer than the context.
    """
    found = _as_array(x, self.tokenizer)
    check_tokens(found, self.model.spec)
    return found.astype(np.int32)

  def logits(self, x: Input, interventions: Mapping[str, Intervention] | None = None) -> np.ndarray:
    """Returns the logits of each next token, float32 `[B, L, V]`.

    Args:
      x: texts or token ids, see the class.
      interventions: a dict from sites to functions. A key is the name of a site (`sites()` lists them) or
        a shell pattern of names. The function takes the activation and returns its replacement, with the
        same shape and dtype.

    Raises UserError as `tokens` does, and for an unknown site or a replacement of another shape or dtype.
    """
    return self._forward(x, (), interventions)[0]

  def activations(
    self,
    x: Input,
    sites: str | Sequence[str] = '*',
    interventions: Mapping[str, Intervention] | None = None,
  ) -> dict[str, np.ndarray]:
    """Returns activations by the name of their site, in the order of the forward pass.

    Attention weights are at 'block_*/attention/attention/weights', as `[B, G, H / G, L, S]` (G key heads,
    H query heads, S keys). No fused kernel writes them out: reading them runs attention as einsums.

    Args:
      x: texts or token ids, see the class.
      sites: a name or a shell pattern such as 'block_*/mlp/hidden', or several of them.
      interventions: see `logits`. A site that is replaced returns its replacement.

    Raises UserError as `logits` does.
    """
    read = tuple(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else (sites,)
    if not all(isinstance(name, str) for name in read):
      raise UserError(f'sites={sites!r} is not valid; valid: names or patterns of `run.sites()`')
    return self._forward(x, read, interventions)[1]

  def sites(self) -> dict[str, tuple[int, ...]]:
    """Returns the names of all sites with the shapes of their activations, for one sequence of the
    context's length."""
    tokens_BxL = jax.ShapeDtypeStruct((1, self.model.spec.context), np.int32)
    with record.recording() as found:
      jax.eval_shape(functools.partial(self.model.apply, mode='eval'), self.variables, tokens_BxL)
    return {name: site.shape for name, site in found.sites.items()}

  def _forward(
    self, x: Input, read: tuple[str, ...], interventions: Mapping[str, Intervention] | None
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the logits, and the activations at the sites `read`.

    A forward pass with interventions is not compiled, so their functions may use NumPy, and each new
    function costs no compilation.
    """
    tokens_BxL = self.tokens(x)
    if interventions is None:
      found = _compiled(self.model, read)(self.variables, tokens_BxL)
    else:
      found = _forward(self.model, self.variables, tokens_BxL, read, _checked(interventions))
    logits_BxLxV, activations = jax.device_get(found)
    return logits_BxLxV, dict(activations)

  def generate(
    self,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    interventions: Mapping[str, Intervention] | None = None,
  ) -> str:
    """Returns a continuation of the prompt, without the prompt.

    Args:
      prompt: a text of at least one token.
      max_new_tokens: tokens to generate, by default as many as the context has room for.
      temperature: divides the logits; 0 = greedy.
      top_k: only the k largest logits may be drawn; 0 = all.
      top_p: only the fewest likeliest tokens with at least this total probability may be drawn; 1 = all.
      seed: seed of the random draws.
      interventions: see `logits`. The functions are called with the activations of the prompt, and then
        with those of each new token (L = 1).

    Raises UserError for a prompt that does not fit the context or the tokenizer, for an option outside
    its range, for a model that cannot decode, and for interventions as `logits` does.
    """
    if not isinstance(prompt, str):
      raise UserError(f'prompt of type {type(prompt).__name__}; valid: a text')
    context = self.model.spec.context
    vocab = self.model.spec.vocab
    ids_L = self.tokenizer.encode_prompt(prompt)
    if not 1 <= len(ids_L) < context:
      raise UserError(
        f'prompt of {len(ids_L)} tokens; valid: 1 to {context - 1} (config.data.context={context}, and '
        'at least one token follows)'
      )
    room = context - len(ids_L)
    count = room if max_new_tokens is None else max_new_tokens
    count, temperature, top_k, top_p, seed = map(_plain, (count, temperature, top_k, top_p, seed))
    Range(int, f'[1, {room}]').require('max_new_tokens', count)
    TEMPERATURE.require('temperature', temperature)
    Range(int, f'[0, {vocab}]').require('top_k', top_k)
    TOP_P.require('top_p', top_p)
    Range(int, '[0, 2^31)').require('seed', seed)
    sampling = Sampling(float(temperature), top_k, top_p)
    decoder = self._decoder if interventions is None else self._changed(_checked(interventions))
    made = (int(token_B[0]) for token_B in decoder.generate([ids_L], count, sampling, seed))
    end = self.tokenizer.eos
    return self.tokenizer.decode(list(itertools.takewhile(lambda token: token != end, made)))

  @functools.cached_property
  def _decoder(self) -> Decoder:
    return Decoder(self.model, self.variables)

  def _changed(self, interventions: Mapping[str, Intervention]) -> Decoder:
    return Decoder(_without_remat(self.model), self.variables, interventions)

  def evaluate(
    self,
    *tasks: str | Evaluation,
    split: str = 'validation',
    text: Overrides | None = None,
    **windows: int | None,
  ) -> Values:
    """Returns metrics by name, by default measured on the text that the model was trained on.

    Args:
      *tasks: names of evaluations (the files of `sparse_lm/evals/`), or evaluations with options of their
        own, such as `Energy(repeats=5)`; by default the loss.
      split: 'train', 'validation' or 'test'.
      text: another text, such as `{'data.path': 'book.txt'}`; see `Runnable.data`.
      **windows: `context`, `stride`, `max_tokens` and `batch`; see `evals.Windows`.

    Raises UserError for unknown names, windows that the model cannot read, text that has changed since
    training, and if an evaluation refuses the model or the text.
    """
    for task in tasks:
      if not isinstance(task, Evaluation) and task not in evals.names():
        raise unknown('evaluation', task, evals.names())
    chosen = [t if isinstance(t, Evaluation) else evals.evaluation(t)() for t in tasks] or [Loss()]
    cut = Windows(**{name: _plain(value) for name, value in windows.items()})
    values: Values = {}
    for evaluation in chosen:
      data = self.loaded.eval_data(split if evaluation.reads_text else None, cut, text)
      values |= evaluation.run(self.loaded.eval_model(), data)
    return values

  def costs(self) -> dict[str, float]:
    """Returns parameter counts, bytes, and FLOPs per token of inference and training, beside those of the
    dense twin; `runs/cost_report.py` explains each number. Gates are charged as the config plans them."""
    return self.loaded.origin.costs()

  @functools.cached_property
  def metrics(self) -> pd.DataFrame:
    """The training log: a row for each logged step, a column for each metric.

    A metric that was not logged at a step is NaN there. Raises UserError if the folder has no log.
    """
    return training_log.read(self.loaded.origin.folder / LOG)

  def plot(self, *names: str) -> Figure:
    """Draws logged metrics over the steps; those of one unit share a panel.

    Args:
      *names: columns of `metrics`, by default the training and validation loss.

    Raises UserError for an unknown name, and if the folder has no log.
    """
    return training_log.figure(self.metrics, names or training_log.LOSSES)


def _plain(value: object) -> object:
  """Returns a NumPy number as the Python number that it is, and anything else as it is."""
  return value.item() if isinstance(value, np.generic) else value


def _as_array(x: Input, tokenizer: Tokenizer) -> np.ndarray:
  """Returns token ids as an array of at least two axes; its dtype and values are not checked."""
  if isinstance(x, str):
    return tokenizer.encode(x)[None]
  if isinstance(x, np.ndarray | jax.Array):
    found = np.asarray(x)
    return found[None] if found.ndim == 1 else found
  if not isinstance(x, list | tuple) or not x:
    shown = f'an empty {type(x).__name__}' if isinstance(x, list | tuple) else type(x).__name__
    raise UserError(
      f'x is {shown}; valid: a text, a list of texts, a list of token ids, or an integer array [tokens] '
      'or [sequences, tokens]'
    )
  rows = [tokenizer.encode(row) if isinstance(row, str) else row for row in x]
  lengths = sorted({len(row) for row in rows if isinstance(row, list | tuple | np.ndarray)})
  if len(lengths) > 1:
    raise UserError(
      f'x holds sequences of {", ".join(map(str, lengths))} tokens; valid: sequences of equal length, or '
      'one at a time'
    )
  try:
    found = np.asarray(rows)
  except (ValueError, TypeError):
    found = np.asarray(rows, object)
  return found[None] if found.ndim == 1 else found


def _checked(interventions: Mapping[str, Intervention]) -> Mapping[str, Intervention]:
  """Returns the interventions. Raises UserError unless they are functions by the names of sites."""
  if isinstance(interventions, Mapping):
    pairs = interventions.items()
    if all(isinstance(name, str) and callable(function) for name, function in pairs):
      return interventions
  raise UserError(
    'interventions is not a dict from names to functions; valid: a dict from the names of sites '
    '(`run.sites()` lists them) to functions of the activation'
  )


def _without_remat(model: LM) -> LM:
  """Returns the model without rematerialisation, which would trace the interventions."""
  return model.clone(spec=dataclasses.replace(model.spec, remat=NO_REMAT))


def _forward(
  model: LM,
  variables: Tree,
  tokens_BxL: np.ndarray | jax.Array,
  read: tuple[str, ...],
  replace: Mapping[str, Intervention],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns logits and activations."""
  model = _without_remat(model)
  return sites.run(model, variables, tokens_BxL, read=read, replace=replace, mode='eval')


@functools.lru_cache(maxsize=16)
def _compiled(model: LM, read: tuple[str, ...]) -> Wrapped:
  """Returns the compiled `(variables, tokens_BxL) -> (logits, activations at the sites read)`."""

  def run(variables: Tree, tokens_BxL: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits_BxLxV, activations = _forward(model, variables, tokens_BxL, read, {})
    return logits_BxLxV, collections.OrderedDict(activations)  # JAX sorts the keys of other dicts

  return jax.jit(run)
