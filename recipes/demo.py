"""Python's own standard library, a 3M-parameter model, a CPU: the whole path in a few minutes.

python prep.py demo && python train.py --recipe demo
"""

from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.generate import SampleConfig
from modalities.log import LogConfig
from modalities.model import ModelConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.recipe import Recipe
from modalities.step import EvalConfig

recipe = Recipe(
    steps=300,
    model=ModelConfig(vocab_size=8192, num_layers=4, width=192, num_heads=3, max_seq_len=256),
    data=DataConfig(seq_len=256, global_batch=16),
    optim=OptimConfig(lr=4e-3, schedule=ScheduleConfig(kind="cosine", warmup=20)),
    parallel=ParallelConfig(micro_batch=16, param_dtype="bfloat16", compile=False),
    eval=EvalConfig(every=100, samples=64),
    sample=SampleConfig(every=100, prompt="def ", num_tokens=64),
    checkpoint=CheckpointConfig(every=100),
    log=LogConfig(every=10),
)
