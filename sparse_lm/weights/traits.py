"""What a weight method declares about itself."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
  """What a weight method declares; each class has it as its attribute `traits`.

  An unknown keyword fails here, so nothing is misspelt in silence.

  Attributes:
    paper: who introduced the method, and where.
    saves: what is not stored or computed because of it.
    needs: names of the signals that `update` reads, see `sparse_lm/signals/`.
    masked: whether any weight is ever dropped.
    exact_density: whether the target is met to the weight.
    replaces_step: whether the optimizer rests in a step that updates the masks. Of several methods in a
      model, it rests for the weights of the one that updates.
    takes_masks: whether a run that starts from a sparse one keeps that one's masks.
    controlled: whether the method learns its density, which the budget controller then moves.
    learns_scores: whether its scores are trainable, see `weights/score.py`.
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
