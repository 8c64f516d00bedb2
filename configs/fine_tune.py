"""Fine-tuning of the pruned tiny model with fixed masks, and with distillation from its dense parent.

Command:  python -m sparse_lm.train --config=configs/tiny.py --workdir=results/tiny
          python -m sparse_lm.prune --workdir=results/tiny --out=results/pruned \\
            --config.weight.name=wanda --config.weight.sparsity=0.7
          python -m sparse_lm.train --config=configs/fine_tune.py --workdir=results/tuned \\
            --config.init_from=results/pruned --config.distill.teacher=results/tiny
Time:     22 s on 2 CPU cores, compilation included; pruning takes another 27 s.
Expected: validation loss 1.907 nats per byte. The pruned model has 2.096, its dense parent 1.893.
Paper:    Wanda (Sun et al. 2023); distillation as in Hinton et al. 2015.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Trains for a fifth of the parent's steps, at a fifth of its learning rate."""
  config = tiny.get_config()
  config.weight.name = 'static'
  config.optimizer.learning_rate = 1e-3
  config.train.update({'steps': 100, 'eval_every': 100})
  return config
