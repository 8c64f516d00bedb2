"""What a run costs in theory, before or after it has run."""

import math
from typing import Any

import jax

from sparse_lm.core import cost, tree
from sparse_lm.core.sparse import Tree
from sparse_lm.model import lm
from sparse_lm.train import observe
from sparse_lm.train.step import Program


def report(
  program: Program,
  target: Tree,
  masks: Tree | None = None,
  observed: dict[str, float] | None = None,
) -> dict[str, Any]:
  """Sizes and FLOPs of the final model and of its training, beside its dense twin's.

  Args:
    program: of the run.
    target: final densities, `None` = dense.
    masks: of the trained model; without them each leaf is taken to meet its target.
    observed: of the trained model in evaluation; without it each gate is taken to let through what
      its config plans (all of it, where it learns that).

  Returns:
    `params`, `prunable_params`, `nonzero_params`, `active_params` (those that a token is multiplied
    with), `sparsity_prunable`, `sparsity_total`, `stored_bytes` (kept weights and a mask bit for each
    weight of a masked leaf), `dense_params` and `dense_bytes` of the dense twin; `flops_forward` and
    `flops_training` per token, and their `_ratio` over the dense twin's. A training step computes
    what learned gates close all the same and is counted so; routers of fixed capacity do not.
  """
  params = lm.shapes(program.model)['params']
  final = {path: float(density) for path, density in tree.named(target).items()}
  shapes = {path: leaf.shape for path, leaf in tree.named(params).items()}
  if masks is None:
    kept = {path: round(math.prod(shapes[path]) * d) for path, d in final.items()}
  else:
    kept = {path: int(jax.numpy.sum(mask)) for path, mask in tree.named(masks).items()}
  sizes = cost.sizes(params, kept)
  twin = cost.sizes(lm.shapes(lm.twin(program.model))['params'], {})
  ledger, dense = program.costs
  density = {path: count / math.prod(shapes[path]) for path, count in kept.items()}
  active = observe.activity(observed or {})
  forward = cost.forward_flops(ledger, density, active)
  method = program.method
  training = cost.training_flops(
    ledger, final, method.density, method.dense_gradient, program.optimizer.steps
  )
  return {
    'params': sizes.params,
    'prunable_params': sizes.prunable,
    'nonzero_params': sizes.nonzero,
    'active_params': round(cost.active_params(ledger, density, active)),
    'sparsity_prunable': sizes.sparsity_prunable,
    'sparsity_total': sizes.sparsity_total,
    'stored_bytes': sizes.stored_bytes,
    'dense_params': twin.params,
    'dense_bytes': twin.stored_bytes,
    'flops_forward': forward,
    'flops_forward_ratio': forward / dense,
    'flops_training': training,
    'flops_training_ratio': training / (3 * dense),
  }
