"""60M parameters with GPT-2's vocabulary and a Llama-like block.

torchrun --nproc_per_node 2 train.py --recipe gpt2_60m
"""

from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig
from modalities.fsdp import ParallelConfig
from modalities.model import ModelConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.recipe import Recipe
from modalities.step import EvalConfig

recipe = Recipe(
    steps=2000,
    model=ModelConfig(vocab_size=50_257, num_layers=10, width=512, num_heads=8, mlp_width=1536, max_seq_len=512),
    data=DataConfig(seq_len=512, global_batch=16),
    optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup=100)),
    parallel=ParallelConfig(micro_batch=4),
    eval=EvalConfig(every=500, samples=64),
    checkpoint=CheckpointConfig(every=500),
)
