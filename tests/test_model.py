"""What the Transformer computes, against counts, gradients and references of another make."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modalities.attention import drop, make_mask
from modalities.fsdp import init_params
from modalities.model import (
    Attention,
    Cache,
    Dropout,
    ModelConfig,
    Transformer,
    build_skeleton,
    flops_per_token,
    num_params,
)
from modalities.optim import Params
from modalities.rope import RopeScaling, rope_cos_sin, rope_frequencies, rotate

GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu_tanh",
    "bias": True,
}
KINDS: list[dict[str, Any]] = [
    {},
    GPT2,
    {"positions": "none", "tied": False, "activation": "gelu"},
    {"num_kv_heads": 2, "qk_norm": True, "head_dim": 24},
    {"num_kv_heads": 1, "bias": True, "norm": "layernorm", "tied": False, "mlp_width": 100},
]


def small(**fields: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 200, "num_layers": 2, "width": 32, "num_heads": 4, "max_seq_len": 64, **fields})


def random_params(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Params:
    """Weights, norms and biases alike far enough from their initial values that each matters."""
    generator = torch.Generator().manual_seed(0)
    params = {}
    for name, param in build_skeleton(config).named_parameters():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.2
        params[name] = (noise + 1 if "norm" in name and name.endswith("weight") else noise).to(dtype)
    return params


def logits_of(config: ModelConfig, params: Params, tokens_BT: Tensor, train: bool = False) -> Tensor:
    return functional_call(build_skeleton(config), params, (tokens_BT,), {"train": train})


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(200, shape, generator=torch.Generator().manual_seed(1))


def many_configs(norm: str, positions: str, activation: str) -> Iterator[ModelConfig]:
    for bias, qk_norm, tied in itertools.product((False, True), repeat=3):
        for num_kv_heads, head_dim, mlp_width in itertools.product((None, 2), (None, 24), (None, 100)):
            yield small(
                norm=norm,
                positions=positions,
                activation=activation,
                bias=bias,
                qk_norm=qk_norm,
                tied=tied,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                mlp_width=mlp_width,
            )


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_num_params_counts_the_real_tensors(norm: str, positions: str, activation: str) -> None:
    for config in many_configs(norm, positions, activation):
        assert num_params(config) == sum(p.numel() for p in build_skeleton(config).parameters()), config


def test_num_params_of_gpt2() -> None:
    gpt2 = ModelConfig(vocab_size=50257, num_layers=12, width=768, num_heads=12, max_seq_len=1024, **GPT2)
    assert num_params(gpt2) == 124_439_808 + (50304 - 50257) * 768  # as published, and the rows of padding


@pytest.mark.parametrize("seq_len", [16, 48])
@pytest.mark.parametrize("fields", KINDS)
def test_flops_per_token_is_what_the_flop_counter_counts(fields: dict[str, Any], seq_len: int) -> None:
    config = small(**fields)
    model = Transformer(config)
    counter = FlopCounterMode(display=False)
    # The counter knows no formula for the CPU's flash kernel and would leave attention out; MATH is two matmuls.
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(random_tokens(3, seq_len)).sum().backward()
    assert counter.get_total_flops() == flops_per_token(config, seq_len) * 3 * seq_len


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (8192, 8192), (50257, 50304)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab_size: int, padded: int) -> None:
    config = small(vocab_size=vocab_size, tied=False)
    assert config.padded_vocab_size == padded
    shapes = {name: tuple(p.shape) for name, p in build_skeleton(config).named_parameters()}
    assert shapes["embed.weight"] == shapes["head.weight"] == (padded, 32)
    assert build_skeleton(config)(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, vocab_size)


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("fields", KINDS)
def test_causality_through_gradients(fields: dict[str, Any]) -> None:
    """d logits[b, t] / d input[b', s] is zero, exactly, for s > t or another row b', and not for any s ≤ t."""
    config = small(**fields)
    model = build_skeleton(config)
    tokens_BT = random_tokens(2, 9)
    params = random_params(config, torch.float32)
    embedded_BTD = params["embed.weight"][tokens_BT].requires_grad_()
    handle = model.embed.register_forward_hook(lambda *_: embedded_BTD)
    logits_BTV = functional_call(model, params, (tokens_BT,))
    handle.remove()
    weight_V = torch.randn(config.vocab_size, generator=torch.Generator().manual_seed(2))
    for t in range(9):
        (grad_BTD,) = torch.autograd.grad(logits_BTV[1, t] @ weight_V, embedded_BTD, retain_graph=True)
        norms_BT = grad_BTD.norm(dim=-1)
        assert torch.equal(norms_BT[0], torch.zeros(9))
        assert torch.equal(norms_BT[1, t + 1 :], torch.zeros(8 - t))
        assert bool((norms_BT[1, : t + 1] > 1e-4).all()), norms_BT[1]


def test_grouped_heads_equal_full_heads_with_repeated_weights() -> None:
    grouped, full = small(num_kv_heads=2, bias=True), small(num_kv_heads=4, bias=True)
    params = random_params(grouped)

    def repeat(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)

    repeated = {name: repeat(p) if ".wk." in name or ".wv." in name else p for name, p in params.items()}
    tokens_BT = random_tokens(2, 20)
    torch.testing.assert_close(
        logits_of(grouped, params, tokens_BT), logits_of(full, repeated, tokens_BT), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("fields", KINDS)
def test_a_row_does_not_depend_on_the_others(fields: dict[str, Any]) -> None:
    config = small(**fields)
    params, tokens_BT = random_params(config), random_tokens(5, 12)
    alone = logits_of(config, params, tokens_BT[3:4])
    torch.testing.assert_close(logits_of(config, params, tokens_BT)[3:4], alone, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------- RoPE


def angles_in_float64(positions_T: Tensor, head_dim: int, theta: float) -> Tensor:
    exponent = torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim
    return positions_T.double()[:, None] / theta**exponent


def turns_of(head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    return rope_cos_sin(torch.arange(4096)[None], small(head_dim=head_dim, rope_theta=theta))


@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10_000.0), (128, 10_000.0), (128, 500_000.0)])
def test_rope_angles_at_4096_tokens(head_dim: int, theta: float) -> None:
    cos, sin = turns_of(head_dim, theta)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (1, 4096, 1, head_dim // 2)
    angles = angles_in_float64(torch.arange(4096), head_dim, theta)
    # fp32 rounds an angle near 4,096 by up to 1.2e-4, and its frequency by 6e-8 of 4,096, which is twice as much.
    assert (cos[0, :, 0] - angles.cos()).abs().max() < 5e-4
    assert (sin[0, :, 0] - angles.sin()).abs().max() < 5e-4


def test_rope_in_bf16_is_computed_in_fp32() -> None:
    x_BTHE = torch.randn(2, 4096, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rope = turns_of(64)
    rotated = rotate(x_BTHE, rope)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x_BTHE.float(), rope).bfloat16())


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q_E, k_E = torch.randn(2, 64, generator=generator).double()

    def scores(rope: tuple[Tensor, Tensor]) -> Tensor:
        """q at every position against k 7 positions before it."""
        q_THE, k_THE = (rotate(x_E.expand(1, 4096, 1, 64), rope)[0] for x_E in (q_E, k_E))
        return (q_THE[7:] * k_THE[:-7]).sum((-2, -1))

    angles = angles_in_float64(torch.arange(4096), 64, 10_000.0)[None, :, None]
    exact = scores((angles.cos(), angles.sin()))
    torch.testing.assert_close(exact, exact[:1].expand(4089), rtol=0, atol=1e-10)
    assert (exact[0] - q_E @ k_E).abs() > 0.1, "the distance had no effect"
    torch.testing.assert_close(scores(turns_of(64)), exact, rtol=0, atol=2e-3)


def test_rotation_keeps_norms() -> None:
    x_BTHE = torch.randn(2, 4096, 3, 64, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x_BTHE, turns_of(64))
    torch.testing.assert_close(rotated.norm(dim=-1), x_BTHE.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(rotated[:, 0], x_BTHE[:, 0]), "position 0 is not turned"


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_positions_can_be_given(positions: str) -> None:
    config = small(positions=positions)
    model, params, tokens_BT = build_skeleton(config), random_params(config), random_tokens(2, 10)
    default = logits_of(config, params, tokens_BT)
    assert torch.equal(functional_call(model, params, (tokens_BT, torch.arange(10).expand(2, 10))), default)
    shifted = functional_call(model, params, (tokens_BT, torch.arange(20, 30).expand(2, 10)))
    if positions == "learned":
        assert (shifted - default).abs().max() > 0.1
    else:  # only distances count, up to the rounding of fp32 angles
        torch.testing.assert_close(shifted, default, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- dropout


def row_of_documents(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and documents [1, T] of documents of these lengths in one row."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    return random_tokens(1, sum(lengths)), positions, documents


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_documents_in_a_row_have_the_logits_that_each_has_alone(
    fields: dict[str, Any], dtype: torch.dtype, bound: float
) -> None:
    config = small(**fields)
    params = random_params(config, dtype)
    tokens, positions, documents = row_of_documents(5, 1, 9, 3)
    together = functional_call(build_skeleton(config), params, (tokens, positions, documents))
    alone = [logits_of(config, params, part) for part in tokens.split([5, 1, 9, 3], dim=1)]
    scale = float(together.abs().max())
    assert (together - torch.cat(alone, dim=1)).abs().max() <= bound * scale
    # One document is what there is without any.
    whole = functional_call(build_skeleton(config), params, (tokens, None, torch.zeros_like(documents)))
    assert (whole - logits_of(config, params, tokens)).abs().max() <= bound * scale
    assert (whole - together).abs().max() > 0.01 * scale


@pytest.mark.parametrize("fields", KINDS)
def test_gradients_do_not_cross_documents(fields: dict[str, Any]) -> None:
    config = small(**fields)
    model, params = build_skeleton(config), random_params(config, torch.float32)
    tokens_BT, positions_BT, documents_BT = row_of_documents(4, 3, 5)
    embedded_BTD = params["embed.weight"][tokens_BT].requires_grad_()
    handle = model.embed.register_forward_hook(lambda *_: embedded_BTD)
    logits_BTV = functional_call(model, params, (tokens_BT, positions_BT, documents_BT))
    handle.remove()
    weight_V = torch.randn(config.vocab_size, generator=torch.Generator().manual_seed(2))
    for t in range(12):
        (grad_BTD,) = torch.autograd.grad(logits_BTV[0, t] @ weight_V, embedded_BTD, retain_graph=True)
        looked_at_T = (documents_BT[0] == documents_BT[0, t]) & (torch.arange(12) <= t)
        norms_T = grad_BTD[0].norm(dim=-1)
        assert torch.equal(norms_T[~looked_at_T], torch.zeros(12 - int(looked_at_T.sum())))
        assert bool((norms_T[looked_at_T] > 1e-4).all()), norms_T


def test_padding_is_a_document_and_gives_no_nan() -> None:
    config = small()
    params = {name: p.requires_grad_() for name, p in random_params(config, torch.float32).items()}
    tokens, positions, documents = row_of_documents(3, 15)
    tokens[0, 3:] = 0
    logits = functional_call(build_skeleton(config), params, (tokens, positions, documents))
    loss = F.cross_entropy(logits[0], torch.tensor([5, 6, *([-100] * 16)]))
    assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(loss, list(params.values())))


def test_dropout_is_off_unless_it_trains() -> None:
    tokens_BT = random_tokens(2, 12)
    dropping, plain = small(embed_dropout=0.3, attn_dropout=0.3, resid_dropout=0.3), small()
    params = random_params(plain, torch.float32)
    expected = logits_of(plain, params, tokens_BT)
    assert torch.equal(logits_of(dropping, params, tokens_BT), expected)
    assert torch.equal(logits_of(plain, params, tokens_BT, train=True), expected)
    # The argument decides, not the mode that a module is in.
    assert torch.equal(functional_call(build_skeleton(dropping).train(), params, (tokens_BT,)), expected)

    def trained(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return logits_of(dropping, params, tokens_BT, train=True)

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))
    assert (trained(0) - expected).abs().max() > 0.1


def test_dropout_reaches_the_attention_weights() -> None:
    config = small(embed_dropout=0.3, attn_dropout=0.3, resid_dropout=0.3)
    attention = Attention(config, layer=0)  # a block drops its output outside of it
    x_BTD = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    rope = rope_cos_sin(torch.arange(6)[None], config)
    mask = make_mask("auto", 6, 6, None, None, None, torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        plain = attention(x_BTD, rope, mask, None, Dropout())
        assert torch.equal(attention(x_BTD, rope, mask, None, Dropout()), plain)
        draws = torch.cat([attention(x_BTD, rope, mask, None, config.dropout) for _ in range(4000)])
    assert bool((draws.std(0) > 0.01).all())
    assert ((draws.mean(0) - plain).abs() < 6 * draws.std(0) / math.sqrt(4000)).all()


def test_drop_keeps_the_mean() -> None:
    torch.manual_seed(0)
    ones = torch.ones(100_000)
    dropped = drop(ones, 0.2)
    assert sorted(set(dropped.tolist())) == [0.0, 1.25]
    assert abs(dropped.mean() - 1) < 0.01
    assert drop(ones, 0.0) is ones


# ------------------------------------------------------------------------------------------------------ initial weights


@pytest.mark.parametrize("std", [0.02, 0.05])
def test_initial_weights_have_the_scale_of_the_config(std: float) -> None:
    config = small(width=256, num_layers=8, qk_norm=True, tied=False, init_std=std, **GPT2)
    params = init_params(build_skeleton(config), seed=0, device=torch.device("cpu"))
    assert set(params) == {name for name, _ in build_skeleton(config).named_parameters()}
    for name, weight in params.items():
        assert weight.dtype == torch.float32
        if name.endswith("bias"):
            assert torch.equal(weight, torch.zeros_like(weight))
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            expected = std / 4 if name.endswith(("wo.weight", "w_down.weight")) else std  # 4 = sqrt(2 × 8 layers)
            assert float(weight.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel())), name
            assert abs(float(weight.mean())) < 5 * expected / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("fields", KINDS)
def test_initial_loss_is_that_of_a_guess(fields: dict[str, Any]) -> None:
    config = small(vocab_size=1024, num_layers=4, width=128, **fields)
    params = init_params(build_skeleton(config), seed=0, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(1024, (2, 8, 64), generator=generator)
    loss = F.cross_entropy(logits_of(config, params, inputs).flatten(0, 1), targets.flatten())
    assert float(loss) == pytest.approx(math.log(1024), rel=0.02)


# ----------------------------------------------------------------------------------------------------------- references


def attend(q_TE: Tensor, k_TE: Tensor, v_TE: Tensor) -> Tensor:
    """One head, written out row by row."""
    rows = []
    for t in range(len(q_TE)):
        weights = torch.exp(k_TE[: t + 1] @ q_TE[t] / math.sqrt(q_TE.shape[1]))
        rows.append(weights / weights.sum() @ v_TE[: t + 1])
    return torch.stack(rows)


def gpt2_reference(params: Params, tokens_T: Tensor, num_layers: int, num_heads: int) -> Tensor:
    """GPT-2 (Radford et al., 2019): LayerNorm before, learned positions, tanh-GELU, biases, tied head."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]

    x = params["embed.weight"][tokens_T] + params["positions.weight"][: len(tokens_T)]
    for i in range(num_layers):
        b = f"blocks.{i}"
        y = norm(x, f"{b}.attn_norm")
        q, k, v = (linear(y, f"{b}.attn.{w}").chunk(num_heads, -1) for w in ("wq", "wk", "wv"))
        x = x + linear(torch.cat([attend(*head) for head in zip(q, k, v, strict=True)], -1), f"{b}.attn.wo")
        h = linear(norm(x, f"{b}.mlp_norm"), f"{b}.mlp.w_up")
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(gelu, f"{b}.mlp.w_down")
    return norm(x, "final_norm") @ params["embed.weight"][:200].T


def llama_reference(params: Params, tokens_T: Tensor, num_layers: int, num_heads: int, num_kv_heads: int) -> Tensor:
    """Llama with QK-norm: RMSNorm before, RoPE as a rotation of complex numbers, SwiGLU, GQA, a head of its own."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * params[f"{name}.weight"]

    def turn(x_TE: Tensor) -> Tensor:
        half = x_TE.shape[1] // 2
        angles = angles_in_float64(torch.arange(len(x_TE)), 2 * half, 10_000.0)
        turned = torch.complex(x_TE[:, :half], x_TE[:, half:]) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag], -1)

    x = params["embed.weight"][tokens_T]
    for i in range(num_layers):
        b = f"blocks.{i}"
        y = norm(x, f"{b}.attn_norm")
        q = [turn(norm(h, f"{b}.attn.q_norm")) for h in (y @ params[f"{b}.attn.wq.weight"].T).chunk(num_heads, -1)]
        k = [turn(norm(h, f"{b}.attn.k_norm")) for h in (y @ params[f"{b}.attn.wk.weight"].T).chunk(num_kv_heads, -1)]
        v = (y @ params[f"{b}.attn.wv.weight"].T).chunk(num_kv_heads, -1)
        group = num_heads // num_kv_heads
        heads = [attend(q[h], k[h // group], v[h // group]) for h in range(num_heads)]
        x = x + torch.cat(heads, -1) @ params[f"{b}.attn.wo.weight"].T
        y = norm(x, f"{b}.mlp_norm")
        gate, up = y @ params[f"{b}.mlp.w_gate.weight"].T, y @ params[f"{b}.mlp.w_up.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ params[f"{b}.mlp.w_down.weight"].T
    return norm(x, "final_norm") @ params["head.weight"][:200].T


@pytest.mark.parametrize(
    ("config", "reference", "bound"),
    [
        (small(**GPT2), lambda p, t: gpt2_reference(p, t, 2, 4), 1e-12),
        # The model's angles and rotation are fp32 in every precision.
        (small(num_kv_heads=2, qk_norm=True, tied=False), lambda p, t: llama_reference(p, t, 2, 4, 2), 1e-5),
    ],
    ids=["gpt2", "llama"],
)
def test_logits_equal_a_reference_written_out(
    config: ModelConfig, reference: Callable[[Params, Tensor], Tensor], bound: float
) -> None:
    params, tokens_T = random_params(config), random_tokens(30)
    expected = reference(params, tokens_T)
    assert expected.std() > 1, "too flat to tell"
    in_float64 = logits_of(config, params, tokens_T[None])[0]
    torch.testing.assert_close(in_float64, expected, rtol=0, atol=bound)
    in_float32 = logits_of(config, {name: p.float() for name, p in params.items()}, tokens_T[None])[0]
    torch.testing.assert_close(in_float32.double(), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- cache


CACHED: list[dict[str, Any]] = [*KINDS, {"window": 5, "num_kv_heads": 2}, {"logit_softcap": 5.0, "qkv_bias": True}]


@pytest.mark.parametrize("fields", CACHED)
def test_a_cache_changes_nothing(fields: dict[str, Any]) -> None:
    """The logits of 14 tokens at once, and of 1, 6, 1, 1 and 5 of them in turn."""
    config = small(**fields)
    params, tokens_BT = random_params(config), random_tokens(2, 14)
    cache = Cache(config, 2, 14, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        pieces = [
            functional_call(build_skeleton(config), params, (part,), {"cache": cache})
            for part in tokens_BT.split([1, 6, 1, 1, 5], dim=1)
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), logits_of(config, params, tokens_BT), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="a cache of 14 tokens has no room for 15"):
        functional_call(build_skeleton(config), params, (tokens_BT[:, :1],), {"cache": cache})


@pytest.mark.parametrize("fields", CACHED)
def test_padding_on_the_left_changes_nothing(fields: dict[str, Any]) -> None:
    config = small(**fields)
    params, tokens_BT = random_params(config), random_tokens(2, 14)
    documents_BT = torch.zeros_like(tokens_BT)
    documents_BT[1, :4] = -1
    positions_BT = torch.stack((torch.arange(14), torch.arange(-4, 10).clamp(min=0)))
    cache, model = Cache(config, 2, 14, torch.float64, torch.device("cpu")), build_skeleton(config)
    with torch.no_grad():
        first = functional_call(
            model, params, (tokens_BT[:, :10], positions_BT[:, :10], documents_BT[:, :10]), {"cache": cache}
        )
        # What comes after the padding is of document 0, as it is without a word.
        rest = functional_call(model, params, (tokens_BT[:, 10:], positions_BT[:, 10:]), {"cache": cache})
    logits_BTV = torch.cat((first, rest), 1)
    torch.testing.assert_close(logits_BTV[:1], logits_of(config, params, tokens_BT[:1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_BTV[1:, 4:], logits_of(config, params, tokens_BT[1:, 4:]), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- what is rarer


def test_a_head_gets_the_hidden_states_and_all_rows() -> None:
    for config in (small(), small(tied=False, logit_softcap=3.0)):
        params, tokens_BT = random_params(config), random_tokens(2, 5)
        hidden_BTD, weight_VD = functional_call(
            build_skeleton(config), params, (tokens_BT,), {"head": lambda hidden, weight: (hidden, weight)}
        )
        assert weight_VD is params["embed.weight" if config.tied else "head.weight"]
        logits_BTV = (hidden_BTD @ weight_VD.T)[..., :200]
        if config.logit_softcap:
            logits_BTV = 3 * torch.tanh(logits_BTV / 3)
        torch.testing.assert_close(logits_of(config, params, tokens_BT), logits_BTV, rtol=0, atol=1e-12)


def test_a_window_ends_what_a_block_sees() -> None:
    """Two blocks with a window of 3 see 4 tokens back."""
    config = small(window=3)
    params = random_params(config)
    tokens_BT = random_tokens(1, 12)
    changed = tokens_BT.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 200
    differs_T = (logits_of(config, params, changed) != logits_of(config, params, tokens_BT)).any(-1)[0]
    assert differs_T.tolist() == [2 <= t <= 6 for t in range(12)]


def test_linear_scaling_is_a_slower_count_of_positions() -> None:
    scaled = small(rope_scaling=RopeScaling(kind="linear", factor=4.0))
    cos, sin = rope_cos_sin(torch.arange(0, 400, 4)[None], scaled)
    expected = rope_cos_sin(torch.arange(100)[None], small())
    torch.testing.assert_close((cos, sin), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_scaling_keeps_short_wavelengths_and_stretches_long_ones(kind: Any) -> None:
    plain, _ = rope_frequencies(small(head_dim=128, rope_theta=500_000.0), torch.device("cpu"))
    scaling = RopeScaling(kind=kind, factor=8.0)
    scaled, factor = rope_frequencies(
        small(head_dim=128, rope_theta=500_000.0, rope_scaling=scaling), torch.device("cpu")
    )
    assert factor == (1.0 if kind == "llama3" else 0.1 * math.log(8) + 1)
    ratio = plain / scaled
    assert bool((ratio[1:] >= ratio[:-1] - 1e-4).all())
    assert float(ratio[0]) == pytest.approx(1) and float(ratio[-1]) == pytest.approx(8)
    assert 3 < int(((ratio > 1.001) & (ratio < 7.999)).sum()) < 40


# --------------------------------------------------------------------------------------------------- impossible configs


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"width": 0}, "width"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"num_heads": 64}, "num_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"num_kv_heads": 8}, "num_kv_heads 8"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_heads": 32}, "head_dim is 1"),
        ({"mlp_width": 0}, "mlp_width"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"norm_eps": -1e-5}, "norm_eps"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"init_std": -0.02}, "init_std"),
        ({"embed_dropout": 1.0}, "embed_dropout is 1.0"),
        ({"attn_dropout": -0.1}, "attn_dropout is -0.1"),
        ({"window": 0}, "window is 0"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0"),
        ({"bias": True, "qkv_bias": True}, "qkv_bias"),
        ({"attn_dropout": 0.1, "attention": "flash"}, "not flash"),
        ({"positions": "none", "rope_scaling": RopeScaling(kind="yarn")}, "rope_scaling"),
    ],
)
def test_an_impossible_config_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        small(**fields)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_an_odd_head_is_possible_without_rope() -> None:
    config = small(head_dim=7, positions="none")
    assert logits_of(config, random_params(config), random_tokens(1, 4)).shape == (1, 4, 200)
