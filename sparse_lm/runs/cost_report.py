"""What a run costs in theory, before or after it has run."""

import math

import jax
from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.measure import observe
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost
from sparse_lm.train.step import Program
from sparse_lm.train.work import Work
from sparse_lm.weights import parts


def report(
  program: Program,
  target: Tree,
  masks: Tree | None = None,
  observed: dict[str, float] | None = None,
  work: Work | None = None,
) -> dict[str, float]:
  """Sizes and FLOPs of the final model and of its training, beside its dense twin's.

  Args:
    program: of the run.
    target: final densities, `None` = dense.
    masks: of the trained model; without them each leaf is taken to meet its target.
    observed: of the trained model in evaluation; without it each gate is taken to be as far open as its
      config plans (wholly, where it learns that).
    work: what training spent, over the tokens of the run's own steps; without it what the config
      predicts, for a run that starts from no other and learns from none.

  Returns:
    `params`, `prunable_params`, `nonzero_params`, `active_params` (those that a token is multiplied
    with), `sparsity_prunable`, `sparsity_total`, `stored_bytes` (kept weights and a mask bit for each
    weight of a masked leaf), `dense_params` and `dense_bytes` of the dense twin, and in FLOPs per token,
    each with its `_ratio` over the dense twin's, `flops_forward` and `flops_forward_causal` of the final
    model, `flops_training`, the mean over the run's own training steps, and `flops_training_total`,
    that of the runs whose weights it started from added (also over the run's own steps).

    Attention is charged over all pairs of the context, by which a window counts as the share that it
    reads of the causal pairs, times all pairs; only in `flops_forward_causal`, of model and twin, is it
    charged for the causal pairs alone, which are about half, and a window for the keys that it reads.

    A training step is charged three times its forward pass at the densities of that step, and what ran
    besides: a dense gradient of the weights, the second forward pass of a sampled policy, what
    `config.model.remat` recomputes, the teacher's forward pass. Weights that a mask drops are not
    charged. What gates close is, whatever kind of gate: training computes it and multiplies by zero.
    Only routers of fixed capacity leave tokens out.
  """
  params = plan_of(program.model).params
  final = {path: float(density) for path, density in tree.named(target).items()}
  shapes = {path: leaf.shape for path, leaf in tree.named(params).items()}
  if masks is None:
    kept = {path: round(math.prod(shapes[path]) * d) for path, d in final.items()}
  else:
    kept = {path: int(jax.numpy.sum(mask)) for path, mask in tree.named(masks).items()}
  sizes = cost.sizes(params, kept)
  twin = cost.sizes(plan_of(lm.dense_twin(program.model)).params, {})
  density = {path: count / math.prod(shapes[path]) for path, count in kept.items()}
  active = observe.activity(observed or {})
  return {
    'params': sizes.params,
    'prunable_params': sizes.prunable,
    'nonzero_params': sizes.nonzero,
    'active_params': round(cost.active_params(program.costs.ledger, density, active)),
    'sparsity_prunable': sizes.sparsity_prunable,
    'sparsity_total': sizes.sparsity_total,
    'stored_bytes': sizes.stored_bytes,
    'dense_params': twin.params,
    'dense_bytes': twin.stored_bytes,
    **_flops(program, density, active, work or Work(own=predicted(program, final))),
  }


def _flops(
  program: Program, density: dict[str, float], active: dict[str, float], work: Work
) -> dict[str, float]:
  """The part of `report` that is in FLOPs per token, and its ratios over the dense twin's."""
  ledger, dense = program.costs.ledger, program.costs.dense
  forward = cost.forward_flops(ledger, density, active)
  causal = cost.forward_flops(cost.causal_pairs(ledger), density, active)
  dense_causal = cost.forward_flops(cost.causal_pairs(program.costs.dense_ledger), {})
  return {
    'flops_forward': forward,
    'flops_forward_ratio': forward / dense,
    'flops_forward_causal': causal,
    'flops_forward_causal_ratio': causal / dense_causal,
    'flops_training': work.own,
    'flops_training_ratio': work.own / (3 * dense),
    'flops_training_total': work.total,
    'flops_training_total_ratio': work.total / (3 * dense),
  }


def predicted(program: Program, target: dict[str, float]) -> float:
  """Mean FLOPs per token of the training steps that a config describes, without a teacher's.

  The batches that are read before step 0 are added to those of the steps.

  Args:
    target: final densities by the path of the leaf.
  """
  steps = program.optimizer.steps
  passes: dict[tuple[float, ...], float] = {}
  before = parts.batches_at_start(program.method)
  total = before * program.start_flops(target) if before else 0.0
  for step in range(steps):
    at = parts.densities(program.method, target, step)
    forward = passes.setdefault(tuple(at.values()), program.costs.training_pass(at))
    total += program.step_flops(step, forward, target)
  return total / steps


def tokens(config: ConfigDict, steps: int) -> int:
  """Tokens of so many training steps, one step at least."""
  return max(steps, 1) * config.data.batch * config.data.context
