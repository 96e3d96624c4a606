"""GPT-2 124M on 10 billion tokens: the reproduction that nanoGPT and llm.c made a yardstick.

    python prep.py pack fineweb.jsonl --tokenizer gpt2/tokenizer.json --out fineweb.pbin
    torchrun --nproc_per_node 8 train.py --recipe gpt2_124m --data.train fineweb.pbin --data.val fineweb_val.pbin \\
        --data.tokenizer gpt2/tokenizer.json

Its data is the demo's until you give your own. Batch, learning rate, warm-up and decay are those of llm.c's
reproduction, with dropout off. By the dry run's estimate it needs a GPU of 40 GB, or several. It was not run: it has no
measured loss and no measured rate.
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
    steps=19_073,  # of 524,288 tokens: 10 billion
    model=presets.gpt2_124m(),
    data=DataConfig(seq_len=1024, global_batch=512),
    optim=OptimConfig(lr=6e-4, schedule=ScheduleConfig(kind="cosine", warmup=700, final=0.0)),
    parallel=ParallelConfig(micro_batch=32),
    eval=EvalConfig(every=250, samples=10_240),
    checkpoint=CheckpointConfig(every=1000),
    log=LogConfig(every=10),
)
