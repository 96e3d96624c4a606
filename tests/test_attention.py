"""Every backend against attention written out in float64, forward and backward."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from tiny import needs_compiler
from torch import Tensor

from modalities.attention import (
    BACKENDS,
    LONGEST_MANUAL,
    Backend,
    Mask,
    _sequence_begins,
    attention,
    choose,
    make_mask,
    why_not,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


class Case(NamedTuple):
    num_queries: int
    num_keys: int
    window: int | None
    documents: bool
    num_heads: int
    kv_heads: int


def cases() -> Iterator[Case]:
    for (t, s), window, documents, heads in itertools.product(
        ((12, 12), (1, 12), (5, 12)), (None, 1, 4, 12, 50), (False, True), ((4, 4), (4, 2), (3, 1))
    ):
        yield Case(t, s, window, documents, *heads)


def documents_of(case: Case) -> Tensor | None:
    """Two rows: of documents of 3, 1, 5, … tokens, and of one that begins with padding."""
    if not case.documents:
        return None
    lengths = torch.tensor([3, 1, 5, case.num_keys - 9])
    padded = torch.tensor([-1] * 4 + [0] * (case.num_keys - 4))
    return torch.stack((torch.arange(4).repeat_interleave(lengths), padded))


def mask_of(backend: Any, case: Case) -> Mask:
    keys = documents_of(case)
    queries = None if keys is None else keys[:, -case.num_queries :]
    return make_mask(backend, case.num_queries, case.num_keys, case.window, queries, keys, CPU)


def heads_of(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, case.num_queries, case.num_heads, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, case.num_keys, case.kv_heads, 8, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def written_out(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query of one head at a time."""
    documents, out = documents_of(case), torch.zeros_like(q)
    for b, t, h in itertools.product(range(2), range(case.num_queries), range(case.num_heads)):
        last, g = case.num_keys - case.num_queries + t, h // (case.num_heads // case.kv_heads)
        seen = [
            s
            for s in range(last + 1)
            if (case.window is None or s > last - case.window)
            and (documents is None or documents[b, s] == documents[b, last])
        ]
        weights = (k[b, seen, g] @ q[b, t, h] / 8**0.5).softmax(0)
        out[b, t, h] = weights @ v[b, seen, g]
    return out


@pytest.mark.parametrize("backend", ["manual", "sdpa", "auto"])
def test_attention_is_what_is_written_out(backend: str) -> None:
    for case in cases():
        q, k, v = heads_of(case)
        found = attention(q, k, v, mask_of(backend, case))
        assert (found - written_out(case, q, k, v)).abs().max() <= 1e-12, case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["manual", "sdpa"])
def test_gradients_are_those_of_float64(backend: str, dtype: torch.dtype) -> None:
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for case in cases():
        results = []
        for precision, name in ((torch.float64, "manual"), (dtype, backend)):
            # The same numbers: those of the narrow type.
            q, k, v = (x.to(dtype).to(precision).requires_grad_() for x in heads_of(case))
            out = attention(q, k, v, mask_of(name, case))
            weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype).to(precision)
            results.append([out, *torch.autograd.grad(out, (q, k, v), weight)])
        for exact, found in zip(*results, strict=True):
            assert found.dtype == dtype
            assert (found.double() - exact).abs().max() <= bound * exact.abs().max().clamp(min=0.1), case


@needs_compiler
def test_flex_is_what_is_written_out() -> None:
    case = Case(5, 12, 4, True, 4, 2)  # one, for it compiles long
    q, k, v = heads_of(case, torch.float32)
    with torch.no_grad():
        found = attention(q, k, v, mask_of("flex", case))
    torch.testing.assert_close(found.double(), written_out(case, *heads_of(case)), rtol=0, atol=1e-5)


def test_a_query_with_padding_alone_before_it_gives_no_nan() -> None:
    case = Case(12, 12, 1, True, 4, 4)
    for backend in ("manual", "sdpa"):
        assert attention(*heads_of(case), mask_of(backend, case)).isfinite().all()


@pytest.mark.parametrize("backend", ["manual", "sdpa"])
def test_dropout_keeps_the_mean(backend: str) -> None:
    case = Case(6, 6, None, False, 4, 2)
    q, k, v = heads_of(case)
    mask = mask_of(backend, case)
    torch.manual_seed(0)
    draws = torch.stack([attention(q, k, v, mask, dropout=0.3) for _ in range(3000)])
    plain = attention(q, k, v, mask)
    assert (draws.std(0)[:, 1:] > 0.01).all()
    assert ((draws.mean(0) - plain).abs() < 6 * draws.std(0) / 3000**0.5).all()


def test_a_plain_causal_mask_is_none() -> None:
    """So that SDPA's own kernel is a flash kernel, and one token after a cache attends without a mask."""
    for t, s, window in ((12, 12, None), (12, 12, 12), (1, 12, None)):
        assert make_mask("auto", t, s, window, None, None, CPU).visible_B1TS is None
    assert make_mask("auto", 12, 12, 11, None, None, CPU).visible_B1TS is not None


def test_auto_takes_all_scores_of_short_sequences_on_a_cpu() -> None:
    """And SDPA for longer ones, for a cache's single query, and on a GPU."""
    for t, s, device, backend in (
        (LONGEST_MANUAL, LONGEST_MANUAL, CPU, "manual"),
        (LONGEST_MANUAL + 1, LONGEST_MANUAL + 1, CPU, "sdpa"),
        (1, 12, CPU, "sdpa"),
        (12, 12, torch.device("meta"), "sdpa"),
    ):
        assert make_mask("auto", t, s, None, None, None, device).backend == backend


def test_auto_never_picks_what_cannot_run() -> None:
    for device in (CPU, CUDA):
        assert why_not(choose("auto", device), device) is None
    assert set(BACKENDS) == {"manual", "sdpa", "flex", "flash"}


def test_a_backend_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="'flash' cannot run here: it needs a CUDA device, and this is cpu; choose"):
        mask_of("flash", Case(12, 12, None, False, 4, 4))
    with pytest.raises(ValueError, match="'flex' cannot run here: FlexAttention has no backward pass on a CPU"):
        mask_of("flex", Case(12, 12, None, False, 4, 4))
    with torch.no_grad():
        assert choose("flex", CPU) == "flex"
    q, k, v = heads_of(Case(12, 12, None, False, 4, 4))
    for backend, why in (("flex", "has no dropout"), ("flash", "has no dropout here")):
        with pytest.raises(ValueError, match=why):
            attention(q, k, v, Mask(backend), dropout=0.1)
    with pytest.raises(ValueError, match="needs parallel.param_dtype bfloat16"):
        attention(q, k, v, Mask("flash"))


def test_where_documents_begin_in_a_batch() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [2, 2, 2, 2, 3, 3]])
    begins = _sequence_begins(documents)
    assert begins.dtype == torch.int32
    assert begins.tolist() == [0, 2, 5, 6, 10, *([12] * 8)]


@pytest.mark.parametrize("size", [1.0, 3.0])  # of queries and keys: scores of a standard deviation of 1 and of 9
def test_auto_of_short_sequences_is_as_exact_in_bf16_as_sdpa(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, LONGEST_MANUAL, 4, 32, generator=generator) for _ in range(4))
    inputs = [x.bfloat16() for x in (size * q, size * k, v, grad)]

    def of(backend: Backend, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v, grad = (x.to(dtype).requires_grad_() for x in inputs)
        mask = make_mask(backend, LONGEST_MANUAL, LONGEST_MANUAL, None, None, None, CPU)
        out = attention(q, k, v, mask)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    exact = of("manual", torch.float64)
    backends: tuple[Backend, ...] = ("auto", "sdpa")
    errors = {}
    for backend in backends:
        found = of(backend, torch.bfloat16)
        errors[backend] = [float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]
    # SDPA's output has half the error of its gradients where scores are large; none of ours is worse than its worst.
    assert max(errors["auto"]) <= max(errors["sdpa"]) and max(errors["auto"]) < 4e-3
