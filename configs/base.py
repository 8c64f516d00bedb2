"""Every shared field and its default. A config starts from here and sets what differs.

A method's own fields (`config.weight.period`, ...) are the fields of its class and join once its
`name` is known; their defaults stand in its file. What each number may be stands in
`sparse_lm/core/ranges.py`, of a method's own fields beside their defaults, and `--help` prints it.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The default architecture, trained densely."""
  return ConfigDict(
    {
      'seed': 0,
      # Workdir of a run to start from: its weights, with static its masks, and its data and tokenizer
      # where neither the command line nor the config file names others.
      'init_from': '',
      'data': _data(),
      'model': _model(),
      'weight': _weight(),
      # A slot's method runs in `layers` (a Python slice), `fallback` in the others. `inner` runs inside a
      # method that wraps another one.
      'activation': _slot('relu2'),
      'attention': _slot('full'),
      'mlp': _slot('dense'),
      'depth': _slot('residual'),
      'stack': {'name': 'sequential'},  # what runs the layers
      'site': {'name': 'none'},  # what acts on activations at named points of all layers
      # Holds the forward FLOPs, weights at their density times open gates, over the dense twin.
      'budget': {
        'target': 1.0,  # fraction of the dense twin's forward FLOPs, 1 = no controller
        'controller': 'dual',  # dual: a price that ascends, and a penalty | quadratic: the penalty
        'weight': 3.0,  # of the quadratic penalty
        'rate': 0.02,  # of the price's ascent
      },
      # Learns from another run's predictions besides the text.
      'distill': {
        'teacher': '',  # its workdir, '' = none
        'weight': 0.5,  # of the teacher's part of the loss, in [0, 1]
        'temperature': 1.0,  # of both distributions
      },
      'optimizer': _optimizer(),
      'train': {
        'steps': 1000,
        'accumulation': 1,  # microbatches an optimizer step; divides the batch
        'log_every': 20,
        'eval_every': 250,
        'checkpoint_every': 500,
      },
    }
  )


def _data() -> dict[str, Any]:
  """What is read, and how it becomes tokens."""
  return {
    'source': 'stdlib',  # stdlib: the Python standard library's own source | files | tfds | mixture
    # files: a glob of text files | tfds: a directory that it prepared as array_record |
    # mixture: sources, paths and weights, such as 'stdlib=0.5, files:a/*.txt=0.3, tfds:b=0.2'
    'path': '',
    'split': (0.9, 0.05, 0.05),  # train, validation, test, for files
    'tokenizer': 'bytes',  # bytes | chars | bpe
    'vocab_size': 1024,  # of bpe; the others have their own and don't read it
    'context': 128,  # tokens a sequence
    'batch': 32,  # sequences an optimizer step
  }


def _model() -> dict[str, Any]:
  """The dimensions of the transformer, and what all layers share."""
  return {
    'layers': 4,
    'width': 256,
    'hidden': 1024,  # of the MLP
    'heads': 4,
    'kv_heads': 4,  # fewer than heads: grouped-query attention
    'norm': 'rmsnorm',  # rmsnorm | layernorm
    'positions': 'rotary',  # rotary | learned
    'init': 'fan_in',  # fan_in | gpt2
    'tied': False,  # the head shares the embedding
    'bigram': False,  # a table [vocabulary, vocabulary] of logits by the last token is learned too
    'bias': False,
    'dropout': 0.0,
    # Precision of the computation: float32 | bfloat16 | auto (bfloat16 on devices where it is faster).
    # Weights, moments, averages, norms and losses are float32 with every precision.
    'precision': 'auto',
    'attention_kernel': 'auto',  # einsum | cudnn (fused) | auto (cudnn where it can run)
    # Activations that the backward pass computes again: none | full (all of a layer) | dots (all but the
    # results of matmuls) | dots_no_batch (all but the results of matmuls with weights)
    'remat': 'none',
    # Whether equal layers run as one scan, which is compiled once however many they are.
    'scan_layers': 'auto',  # auto: where 32 or more layers are equal, never on a CPU | always | never
  }


def _weight() -> dict[str, Any]:
  """Which weights exist."""
  return {
    'name': 'none',
    'sparsity': 0.0,  # over all prunable weights together
    'distribution': 'uniform',  # uniform | er | erk | a map such as 'attention=0.5,mlp=0.9'
    'dense': (
      'embed',
      'head',
      'norm',
      'bias',
      'router',
    ),  # path expressions of what is never pruned
    # Several methods: the names of `rules`, each of which prunes what its `match` finds. A rule
    # begins with the values above, and the first that finds a parameter prunes it.
    'order': (),
    'rules': {},
  }


def _optimizer() -> dict[str, Any]:
  """The optimizer and its learning rate."""
  return {
    'name': 'adamw',
    'learning_rate': 2e-3,
    'schedule': 'cosine',  # cosine | linear | constant, after the warm-up
    'warmup': 0.05,  # fraction of the steps
    'final': 0.1,  # fraction of the rate at the last step
    'momentum': 0.9,  # b1 of the Adam family and Lion
    'b2': 0.99,
    'eps': 1e-8,  # of adamw and nadamw, added to the root of the second moment
    'weight_decay': 0.1,  # decoupled; matrices only
    'decay_last': False,  # decay what the update makes of the weights, not what they were before it
    'clip': 1.0,  # global gradient norm, 0 = off
    'normalize': False,  # divide the gradient by its root mean square over all parameters together
    'ema': 0.0,  # decay of the parameters' moving average used for evaluation, 0 = off
  }


def _slot(name: str) -> dict[str, Any]:
  """The config of a layer slot that holds the method `name`."""
  method = {'name': name, 'layers': ':', 'inner': {'name': name}, 'fallback': {'name': name}}
  # Several methods: the names of `rules`, each with a name, layers and an inner of its own.
  return method | {'order': (), 'rules': {}}
