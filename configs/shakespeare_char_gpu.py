"""nanoGPT's GPU setting on tiny Shakespeare, with nanoGPT's architecture.

Command:  python -m sparse_lm.train --config=configs/shakespeare_char_gpu.py --workdir=results/gpu
          --config.data.path=<folder>/tiny_shakespeare.txt
Time:     not measured. Meant for a GPU, where it has not run yet; on 2 CPU cores its 1.2 TFLOP a step
          would take some 13 s each.
Expected: validation loss 1.4697 nats per character: nanoGPT's own figure for its best checkpoint; the
          last step, over the whole split, is higher where the model overfits.
Source:   github.com/karpathy/nanoGPT, config/train_shakespeare_char.py.
"""

from ml_collections import ConfigDict

from configs import shakespeare_char_nanogpt


def get_config() -> ConfigDict:
  """6 layers, 6 heads, width 384, context 256, batch 64, 5000 steps, dropout 0.2."""
  config = shakespeare_char_nanogpt.get_config()
  config.data.update({'context': 256, 'batch': 64})
  config.model.update(
    {'layers': 6, 'width': 384, 'hidden': 1536, 'heads': 6, 'kv_heads': 6, 'dropout': 0.2}
  )
  config.optimizer.update({'warmup': 0.02})
  config.train.update({'steps': 5000, 'checkpoint_every': 1000})
  return config
