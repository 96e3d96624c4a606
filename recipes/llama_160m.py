"""160M parameters, Llama-like, GPT-2's vocabulary: an afternoon's experiment on a few GPUs.

    torchrun --nproc_per_node 8 train.py --recipe llama_160m --data.train fineweb.pbin --data.val fineweb_val.pbin \\
        --data.tokenizer gpt2/tokenizer.json

Its data is the demo's until you give your own. 3.2 billion tokens, 20 a parameter (Hoffmann et al., arXiv 2203.15556);
warm-up, stable, decay, so that a run can be continued from before its decay. By the dry run's estimate it needs a GPU
of 40 GB, or several. It was not run: it has no measured loss and no measured rate.
"""

from modalities import presets
from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.log import LogConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.recipe import Recipe
from modalities.step import EvalConfig

recipe = Recipe(
    steps=6100,  # of 524,288 tokens
    model=presets.llama_160m(),
    data=DataConfig(seq_len=2048, global_batch=256),
    optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig(kind="wsd", warmup=300, decay=1200, final=0.0)),
    parallel=ParallelConfig(micro_batch=16),
    eval=EvalConfig(every=250, samples=2048),
    checkpoint=CheckpointConfig(every=500),
    log=LogConfig(every=10),
)
