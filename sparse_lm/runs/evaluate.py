"""Evaluating a run, and the contents of its result.json."""

from sparse_lm.core.aot import Call
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.data.pipeline import Data
from sparse_lm.evals import EvalData, EvalModel, Values
from sparse_lm.evals.loss import mean_losses, packed_call, run_packed, separated
from sparse_lm.measure import observe
from sparse_lm.model import lm
from sparse_lm.runs import configs, cost_report
from sparse_lm.runs.environment import environment
from sparse_lm.runs.setup import Setup
from sparse_lm.train.states import TrainState
from sparse_lm.train.work import Work


def evaluate(run: Setup, params: Tree, model_state: Tree, split: str = 'validation') -> Values:
  """Returns the values of `evals.loss.mean_losses` on a split of the run's data."""
  model = EvalModel(run.program.model, {'params': params, **model_state})
  return mean_losses(model, EvalData.of_split(run.data, split))


def evaluate_packed(run: Setup, params: Tree, model_state: Tree) -> list[Values]:
  """Evaluates several runs on the validation split at once.

  Args:
    run: one of the runs. All of them share its model and data.
    params: parameters with a leading axis of runs.
    model_state: the model's other collections, with a leading axis of runs.
  """
  variables = {'params': params, **model_state}
  return run_packed(run.program.model, variables, EvalData.of_split(run.data))


def evaluation_of_packed(run: Setup, params: Tree, model_state: Tree) -> Call:
  """Returns the call that `evaluate_packed` makes for each batch, to compile it in advance."""
  return packed_call(run.program.model, {'params': params, **model_state}, run.data.batch)


def result_of(
  run: Setup,
  state: TrainState,
  masks: Tree,
  measured: Values,
  work: Work,
) -> JsonObject:
  """Returns the contents of result.json.

  Args:
    run: the run.
    state: its last state.
    masks: masks of the evaluated model.
    measured: measurements of the run, including those of `evaluate` on the validation split.
    work: FLOPs that training has spent.
  """
  numbers, observed = separated(measured)
  spent = work.over(cost_report.tokens(run.config, int(state.step)))
  kernels = {'attention': ', '.join(run.kernels)} if run.kernels else {}
  return {
    'config': configs.to_json(run.config),
    'env': environment() | kernels,
    'data': run.data.card,
    'evaluation': _cards(run.data),
    'causal': lm.causal(run.program.model),
    'batch_independent': lm.batch_independent(run.program.model),
    'metrics': {
      'steps': int(state.step),
      **numbers,
      **cost_report.report(run.program, state.sparse.target, masks, observed, spent),
      **observe.summary(observed),
    },
  }


def _cards(data: Data) -> dict[str, JsonObject]:
  """Returns for each evaluated metric the data, split, context and unit that it was measured with."""
  whole = data.evaluation()
  return {
    'val_loss': whole,
    'val_bits_per_byte': whole | {'unit': 'bits per byte'},
    **{f'val_loss/{name}': data.evaluation(component=name) for name in data.components() if name},
  }
