"""All shared fields and their defaults. Every other config starts from this one and changes fields.

A method has fields of its own, such as `config.weight.period`. They and their defaults are declared in
the method's class, and they join the config once the `name` of the method is set. Valid values are
declared in `sparse_lm/core/ranges.py` for shared fields and in the class for a method's own fields.
`--help` prints all of them.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The default architecture, trained densely."""
  return ConfigDict(
    {
      'seed': 0,
      # Workdir of a run to start from, '' = none. The run gives its weights, its masks to the method
      # `static`, and its data and tokenizer unless the command line or the config file sets others.
      'init_from': '',
      'data': _data(),
      'model': _model(),
      'weight': _weight(),
      # Each slot runs the method `name` in the layers of the Python slice `layers`, and `fallback` in the
      # other layers. `inner` is the method that a wrapping method, such as a gate, runs inside itself.
      'activation': _slot('relu2'),
      'attention': _slot('full'),
      'mlp': _slot('dense'),
      'depth': _slot('residual'),
      'stack': {'name': 'sequential'},  # runs the layers
      'site': {'name': 'none'},  # changes activations at named points of all layers
      # Holds the forward FLOPs (weights at their density, times the fraction of open gates) at a fraction
      # of those of the dense twin.
      'budget': {
        'target': 1.0,  # this fraction; 1 = no controller
        'controller': 'dual',  # dual: ascent on a price, with a penalty | quadratic: the penalty
        'weight': 3.0,  # weight of the quadratic penalty
        'rate': 0.02,  # step size of the dual ascent
      },
      # Distillation: the run also learns from the predictions of another run.
      'distill': {
        'teacher': '',  # workdir of that run, '' = none
        'weight': 0.5,  # weight of the teacher's part of the loss, in [0, 1]
        'temperature': 1.0,  # softmax temperature of teacher and student
      },
      'optimizer': _optimizer(),
      'train': {
        'steps': 1000,
        'accumulation': 1,  # microbatches per optimizer step; must divide the batch
        'log_every': 20,
        'eval_every': 250,
        'checkpoint_every': 500,
      },
    }
  )


def _data() -> dict[str, Any]:
  """The text, the tokenizer and the batches."""
  return {
    'source': 'stdlib',  # stdlib: the Python standard library's own source | files | tfds | mixture
    # files: a glob of text files | tfds: a directory that TFDS prepared as array_record |
    # mixture: sources, paths and weights, such as 'stdlib=0.5, files:a/*.txt=0.3, tfds:b=0.2'
    'path': '',
    'split': (0.9, 0.05, 0.05),  # train, validation, test, for files
    'tokenizer': 'bytes',  # bytes | chars | bpe
    'vocab_size': 1024,  # vocabulary of bpe; other tokenizers ignore it
    'context': 128,  # tokens per sequence
    'batch': 32,  # sequences per optimizer step
  }


def _model() -> dict[str, Any]:
  """The dimensions and options of the transformer."""
  return {
    'layers': 4,
    'width': 256,
    'hidden': 1024,  # width of the MLP
    'heads': 4,
    'kv_heads': 4,  # fewer than heads: grouped-query attention
    'head_width': 0,  # width of each head; 0 = width / heads
    'norm': 'rmsnorm',  # rmsnorm | layernorm
    'norm_epsilon': 1e-5,  # added to the mean square before the root, in every norm
    # RMSNorm of queries and keys: none | head (each head by itself) | all (all heads together)
    'query_key_norm': 'none',
    'positions': 'rotary',  # rotary | learned
    'rope_base': 10_000.0,  # base of the wavelengths of rotary positions
    'rope_fraction': 1.0,  # fraction of each head's width that is rotated
    # Longer wavelengths, for contexts longer than the model was trained on: none | linear (all are
    # multiplied by rope_factor) | llama3 (only the long ones are)
    'rope_scaling': 'none',
    'rope_factor': 1.0,
    # llama3: wavelengths above rope_context / rope_low tokens are multiplied, those below rope_context /
    # rope_high stay, and those between are interpolated.
    'rope_low': 1.0,
    'rope_high': 4.0,
    'rope_context': 8192,  # context of the original model, in tokens
    'parallel_residual': False,  # True: the MLP reads the layer's input, as attention does
    'init': 'fan_in',  # fan_in | gpt2
    'tied': False,  # True: the head shares the weights of the embedding
    'embed_scale': 1.0,  # factor of the token embeddings
    'logit_scale': 1.0,  # factor of the inputs of the head, and so of the logits
    'bigram': False,  # True: also learns a table [vocabulary, vocabulary] of logits
    'bias': False,  # True: all linear layers have a bias, and so has layernorm
    # Linear layers that have a bias although `bias` is False, such as ('query', 'key', 'value'). 'norm'
    # stands for every layernorm.
    'biases': (),
    'dropout': 0.0,
    # Precision of the computation: float32 | bfloat16 | auto (bfloat16 on devices where it is faster).
    # Moments, averages, norms and losses are always float32.
    'precision': 'auto',
    'weights_dtype': 'float32',  # dtype of the weights in memory and on disk: float32 | bfloat16
    'attention_kernel': 'auto',  # einsum | cudnn (fused) | auto (cudnn where it can run)
    # Activations that the backward pass recomputes: none | full (all of a layer) | dots (all but the
    # results of matmuls) | dots_no_batch (all but the results of matmuls with weights)
    'remat': 'none',
    # Equal layers can run as one scan, which compiles a single layer: always | never | auto (where 32 or
    # more layers are equal, never on a CPU)
    'scan_layers': 'auto',
  }


def _weight() -> dict[str, Any]:
  """The weight method and the weights that it prunes."""
  return {
    'name': 'none',
    'sparsity': 0.0,  # fraction of all prunable weights that is zero in the end
    'distribution': 'uniform',  # uniform | er | erk | owl | a map such as 'attention=0.5,mlp=0.9'
    'dense': (
      'embed',
      'head',
      'norm',
      'bias',
      'router',
    ),  # path expressions of parameters that are never pruned
    # Several methods: `order` names entries of `rules`. Each rule prunes the parameters that its `match`
    # selects and starts from the values above. The first rule that matches a parameter prunes it.
    'order': (),
    'rules': {},
  }


def _optimizer() -> dict[str, Any]:
  """The optimizer and its learning rate."""
  return {
    'name': 'adamw',
    'learning_rate': 2e-3,
    'schedule': 'cosine',  # cosine | linear | constant, after the warm-up
    'warmup': 0.05,  # length of the warm-up, as a fraction of the steps
    'final': 0.1,  # rate at the last step, as a fraction of learning_rate
    'momentum': 0.9,  # b1 of the Adam family and Lion
    'b2': 0.99,
    'eps': 1e-8,  # of adamw and nadamw: added to the root of the second moment
    'weight_decay': 0.1,  # decoupled; matrices only
    'decay_last': False,  # True: decays the weights after the update instead of before it
    'clip': 1.0,  # largest global norm of the gradient, 0 = off
    'normalize': False,  # True: divides the gradient by its root mean square over all parameters
    'ema': 0.0,  # decay of the moving average of the parameters for evaluation, 0 = off
  }


def _slot(name: str) -> dict[str, Any]:
  """The config of a layer slot with the method `name`."""
  method = {'name': name, 'layers': ':', 'inner': {'name': name}, 'fallback': {'name': name}}
  # Several methods: `order` names entries of `rules`, each with its own `name`, `layers` and `inner`.
  return method | {'order': (), 'rules': {}}
