"""The theoretical costs of a run: parameters, bytes and FLOPs, before or after training.

Sizes:

- `params`, `prunable_params`, `nonzero_params`: parameters.
- `active_params`: parameters that one token is multiplied with.
- `sparsity_prunable`, `sparsity_total`: fraction of zeros among the prunable and among all
  parameters.
- `stored_bytes`: bytes of the kept weights, and a mask bit for each weight of a masked parameter.
- `dense_params`, `dense_bytes`: parameters and bytes of the dense twin.

FLOPs per token, each also as a `_ratio` to the dense twin:

- `flops_forward`: forward pass of the final model, attention charged over all pairs of the context.
  A window is charged the fraction of the causal pairs that it reads, times all pairs.
- `flops_forward_causal`: the same with attention charged over the causal pairs alone, about half of
  all pairs. A window is charged the keys that it reads.
- `flops_training`: mean over the run's own training steps.
- `flops_training_total`: `flops_training` plus the training of the runs whose weights it started
  from, also per token of the run's own steps.

A training step is charged with three forward passes at the densities of that step. Where they occur,
the following are charged in addition: a dense gradient of the weights, the second forward pass of a
sampled policy, recomputation by `config.model.remat`, and the teacher's forward pass. Dropped weights
are not charged. Units behind closed gates are charged, because training computes them and multiplies
them by zero. Tokens that a router of fixed capacity leaves out are not charged.
"""

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
  """Returns sizes and FLOPs of the final model and of its training, beside those of the dense twin.

  Args:
    program: the run's program.
    target: final densities of the prunable parameters, `None` = dense.
    masks: masks of the trained model. Without them each parameter is assumed to meet its target.
    observed: measurements of the gates on evaluation text. Without them each gate is assumed to be open
      as often as its config plans, and always open if its rate is learned.
    work: FLOPs that training spent, per token of the run's own steps. Without it the config's
      prediction is reported, which is right for a run without a parent and without a teacher.

  Returns:
    Numbers by name; the module's docstring describes them.
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
  """Returns the FLOPs per token of `report`, with their ratios to the dense twin."""
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
  """Predicts the mean FLOPs per token of a training step, without a teacher.

  The FLOPs of batches that are read before step 0 are spread over the steps.

  Args:
    program: the run's program.
    target: final densities by the path of the parameter.
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
  """Returns the number of tokens in so many training steps, at least one step."""
  return max(steps, 1) * config.data.batch * config.data.context
