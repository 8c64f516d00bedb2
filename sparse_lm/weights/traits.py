"""The declarations of a weight method."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
  """The declarations of a weight method, in its class attribute `traits`.

  An unknown keyword raises an error, so no misspelt trait is ignored.

  Attributes:
    paper: authors, year and title of the paper, or 'none'.
    saves: the storage and computation that the method saves.
    needs: names of the signals that `update` reads; see `sparse_lm/signals/`.
    masked: whether the method ever drops a weight.
    exact_density: whether the method keeps exactly as many weights as the target density says.
    replaces_step: whether a mask update replaces the optimizer step. If a model has several methods, only
      the weights of the method that updates skip the step.
    takes_masks: whether a run that starts from a sparse run (`config.init_from`) uses that run's masks.
    controlled: whether the method learns its density, which the budget controller can then change.
    learns_scores: whether the scores are learned; see `weights/score.py`.
  """

  paper: str = ''
  saves: str = ''
  needs: tuple[str, ...] = ()
  masked: bool = True
  exact_density: bool = True
  replaces_step: bool = False
  takes_masks: bool = False
  controlled: bool = False
  learns_scores: bool = False
