"""Distillation against float64, what it never materialises, and students that learn from a teacher or its notes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from test_loss import Largest
from torch import Tensor
from words import write_words

from modalities import checkpoint, evaluate, kl, log, loop, recipe, topk, trained
from modalities.checkpoint import CheckpointConfig
from modalities.compiling import compiled
from modalities.config import to_dict
from modalities.kl import DistillConfig, distillation
from modalities.loss import IGNORED, LossConfig
from modalities.recipe import Recipe
from modalities.step import EvalConfig, TrainState

B, T, D, E, V, PADDED = 3, 17, 16, 24, 101, 128
Kind = Literal["forward", "reverse"]


def inputs(dtype: torch.dtype, topk: int = 0, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, kl.Batch]:
    """(hidden, weight, targets, what a teacher says: its hidden states and its head, or `topk` words)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher_hidden, teacher_weight = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)
        for shape, spread in (((B, T, D), 1.0), ((PADDED, D), 0.5), ((B, T, E), 1.0), ((PADDED, E), 0.5))
    )
    targets = torch.randint(V, (B, T), generator=generator)
    targets[torch.rand(B, T, generator=generator) < 0.3] = IGNORED
    if not topk:
        return hidden, weight, targets, {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    log_q = (teacher_hidden @ teacher_weight[:V].T / temperature).log_softmax(-1)
    known, words = log_q.topk(topk)
    rest = log_q.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)
    return hidden, weight, targets, {"teacher_words": words, "teacher_log_probs": torch.cat((known, rest), -1)}


def gradients(
    x: tuple[Tensor, Tensor, Tensor, kl.Batch],
    config: DistillConfig,
    loss: LossConfig = LossConfig(implementation="chunked", chunk_tokens=10),  # noqa: B008  (it is frozen)
    softcaps: tuple[float, float] = (0.0, 0.0),
    transform: Callable[..., Any] = lambda f: f,
) -> tuple[Tensor, ...]:
    """(gradient of hidden, of weight, loss, -log p, the data's part, the teacher's part) by `torch.func`."""
    hidden, weight, targets, teacher = x

    def loss_fn(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        value, nll, aux = distillation(
            config, softcaps[1], hidden, weight, targets, loss, V, softcaps[0], 77.0, False, teacher
        )
        return value, (nll, aux)

    grads, (value, (nll, aux)) = transform(torch.func.grad_and_value(loss_fn, argnums=(0, 1), has_aux=True))(
        hidden, weight
    )
    return *grads, value, nll, aux["data_loss"], aux["kl_loss"]


def reference(
    x: tuple[Tensor, Tensor, Tensor, kl.Batch],
    config: DistillConfig,
    loss: LossConfig = LossConfig(),  # noqa: B008  (it is frozen)
    softcaps: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, ...]:
    """The same in float64 from probabilities, by PyTorch's backward pass, one formula after another."""
    hidden, weight = (t.double().requires_grad_() for t in x[:2])
    valid, teacher = x[2] != IGNORED, {name: t.double() for name, t in x[3].items()}

    def capped(logits: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(logits / cap) if cap else logits

    student = capped(hidden[valid] @ weight[:V].T, softcaps[0])
    log_p = student.log_softmax(-1)
    nll = -log_p[torch.arange(len(log_p)), x[2][valid]]
    data = (1 - loss.label_smoothing) * nll - loss.label_smoothing * log_p.mean(-1)
    data = data + loss.z_loss * student.logsumexp(-1) ** 2
    p = (student / config.temperature).softmax(-1)
    if "teacher_words" in teacher:  # K + 1 outcomes, the last of which is any other word
        words, log_q = x[3]["teacher_words"][valid], teacher["teacher_log_probs"][valid]
        named = p.gather(-1, words)
        p, q = torch.cat((named, 1 - named.sum(-1, keepdim=True)), -1), log_q.exp()
    else:
        q = capped(teacher["teacher_hidden"][valid] @ teacher["teacher_weight"][:V].T, softcaps[1])
        q = (q / config.temperature).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1) if config.kind == "reverse" else (q * (q / p).log()).sum(-1)
    parts = [part.sum() / 77 for part in (data, nll, config.temperature**2 * divergence)]
    value = (1 - config.weight) * parts[0] + config.weight * parts[2]
    nll_BT = torch.zeros(x[2].shape, dtype=torch.float64).masked_scatter(valid, nll.detach())
    return *torch.autograd.grad(value, (hidden, weight)), value.detach(), nll_BT, parts[1].detach(), parts[2].detach()


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("topk", [0, 7])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.5, 0.3)])
def test_equals_the_formula_in_float64(kind: Kind, topk: int, temperature: float, weight: float) -> None:
    x = inputs(torch.float64, topk, temperature)
    config = DistillConfig(kind=kind, temperature=temperature, weight=weight)
    for got, expected in zip(gradients(x, config), reference(x, config), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_the_datas_own_terms_and_soft_caps(kind: Kind) -> None:
    x = inputs(torch.float64)
    config, loss = DistillConfig(kind=kind, temperature=2.0, weight=0.4), LossConfig(label_smoothing=0.1, z_loss=1e-2)
    found, expected = gradients(x, config, loss, (3.0, 5.0)), reference(x, config, loss, (3.0, 5.0))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@tiny.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topk", [0, 7])
def test_compiled_it_is_the_same(topk: int) -> None:
    x, config = inputs(torch.float32, topk, 2.0), DistillConfig(temperature=2.0)
    found = gradients(x, config, transform=compiled)
    for got, expected in zip(found, reference(x, config), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_in_bf16_it_is_rounded_once() -> None:
    x, config = inputs(torch.bfloat16), DistillConfig(temperature=2.0)
    found, expected = gradients(x, config), reference(x, config)
    assert found[0].dtype == found[1].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    for got, want in zip(found, expected, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_all_words_noted_are_the_whole_teacher(kind: Kind) -> None:
    config = DistillConfig(kind=kind, temperature=2.0)
    found, expected = (gradients(inputs(torch.float64, topk, 2.0), config) for topk in (V, 0))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_an_ignored_target_teaches_exactly_nothing(kind: Kind) -> None:
    hidden, weight, targets, teacher = inputs(torch.float32)
    config, ignored = DistillConfig(kind=kind), targets == IGNORED
    clean = gradients((hidden, weight, targets, teacher), config)
    assert (clean[0][ignored] == 0).all() and (clean[3][ignored] == 0).all() and clean[0][~ignored].all()
    hidden, said = hidden.clone(), teacher["teacher_hidden"].clone()
    said[ignored] = 1e4  # whatever the teacher says there
    changed = gradients((hidden, weight, targets, teacher | {"teacher_hidden": said}), config)
    assert all(torch.equal(a, b) for a, b in zip(clean, changed, strict=True))


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    hidden, weight, targets, _ = inputs(torch.float64)
    x = hidden, weight, targets, {"teacher_hidden": hidden, "teacher_weight": weight}
    for kind in ("forward", "reverse"):
        config = DistillConfig(weight=1.0, kind=kind)
        *grads, _, _, _, kl_loss = gradients(x, config)
        assert max(float(grad.abs().max()) for grad in grads) < 1e-15 and abs(float(kl_loss)) < 1e-13


@pytest.mark.parametrize("topk", [0, 7])
def test_neither_models_logits_exist_in_full(topk: int) -> None:
    torch.manual_seed(0)
    tokens, words, chunk = 512, 1000, 32
    x: list[Any] = [torch.randn(tokens, 8), torch.randn(words, 8), torch.randint(words, (tokens,)), torch.ones(())]
    if topk:
        x += [None, None, torch.rand(tokens, words).topk(topk).indices, torch.randn(tokens, topk + 1)]
    else:
        x += [torch.randn(tokens, 8), torch.randn(words, 8), None, None]
    x += [0.0, 0.0, 0.0, 0.0, 1.0, 0.5, False, words, chunk, True, False]
    with Largest() as largest:  # which the operator would hide
        kl._in_chunks(*x)
    assert largest.numel == chunk * words


# ----------------------------------------------------------------------------------------------------------------- runs

CPU = torch.device("cpu")
STUDENT = replace(tiny.MODEL, num_layers=1, width=16, num_heads=2, mlp_width=32)


def write_teacher(run: Path, **model: Any) -> Path:
    """A teacher of another width and depth whose weights are random and large: it has opinions."""
    config = replace(tiny.MODEL, logit_softcap=4.0, **model)
    generator = torch.Generator().manual_seed(7)
    named = trained.build_skeleton(config).named_parameters()
    params = {name: torch.empty(p.shape).normal_(std=0.5, generator=generator) for name, p in named}
    facts = to_dict(tiny.recipe(run.parent, model=config))
    return checkpoint.save(run, TrainState(params, {}), facts, is_main=True)


def student(folder: Path, name: str, config: DistillConfig, **changes: Any) -> Recipe:
    quick = {"steps": 6, "checkpoint": CheckpointConfig(every=3), "eval": EvalConfig(every=0), "model": STUDENT}
    return tiny.recipe(folder, name=name, distill=config, **(quick | changes))


def curve(run: Path) -> Tensor:
    """`loss`, `loss/data` and `loss/kl` of each step, [steps, 3]."""
    lines = [line for line in log.read_metrics(run) if "loss" in line]
    return torch.tensor([[line[key] for key in ("loss", "loss/data", "loss/kl")] for line in lines])


def weights(run: Path) -> Tensor:
    return torch.cat([p.flatten() for p in trained.load(run, CPU).params.values()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a teacher, and a student that it taught."""
    folder = tmp_path_factory.mktemp("distill")
    teacher = write_teacher(folder / "teacher").parent
    loop.train(student(folder, "online", DistillConfig(teacher=str(teacher), weight=0.3)))
    return folder


def test_the_log_has_both_parts_of_the_loss(folder: Path) -> None:
    found = curve(folder / "runs" / "online")
    assert found.shape == (6, 3)
    torch.testing.assert_close(found[:, 0], 0.7 * found[:, 1] + 0.3 * found[:, 2])
    assert (found[1:, 2] < found[0, 2]).all(), "nothing was learnt from the teacher"


def test_the_loss_is_that_of_both_models_logits(folder: Path) -> None:
    """The first step's, from the logits that the models give where nobody distils."""
    start = student(folder, "online", DistillConfig(teacher=str(folder / "teacher"), weight=0.3))
    run, state = loop.build(start, loop.dist.World(0, 1, CPU, None))
    batch = run.data.read(0)
    teacher, model = trained.load(folder / "teacher", CPU), loop.build_skeleton(STUDENT)
    tokens, targets = batch["inputs"].flatten(0, 1), batch["targets"].flatten(0, 1)
    with torch.no_grad():
        log_p = loop.step.apply(model, state.params, tokens, False).double().log_softmax(-1)
        log_q = loop.step.apply(teacher.model, teacher.params, tokens, False).double().log_softmax(-1)
    data = -log_p.gather(-1, targets[..., None]).mean()
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected = torch.stack((0.7 * data + 0.3 * divergence, data, divergence)).float()
    torch.testing.assert_close(curve(folder / "runs" / "online")[0], expected, rtol=1e-5, atol=0)


def test_micro_batches_chunks_and_autograd_change_nothing(folder: Path) -> None:
    config = DistillConfig(teacher=str(folder / "teacher"), weight=0.3)
    base = student(folder, "cut", config, loss=LossConfig(implementation="chunked", chunk_tokens=50))
    loop.train(replace(base, parallel=replace(base.parallel, micro_batch=8, activation_checkpointing="full")))
    found, expected = (curve(folder / "runs" / name) for name in ("cut", "online"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def train_on_ranks(folder: Path) -> None:
    loop.train(student(folder, "ranks", DistillConfig(teacher=str(folder / "teacher"), weight=0.3)))


def test_a_sharded_teacher_teaches_sharded_students_the_same(folder: Path) -> None:
    tiny.run_ranks(2, train_on_ranks, folder)
    found, expected = (curve(folder / "runs" / name) for name in ("ranks", "online"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(*(weights(folder / "runs" / name) for name in ("ranks", "online")), rtol=0, atol=2e-5)


def test_resuming_gives_the_same_weights_and_another_teacher_is_noticed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    for name in ("train.pbin", "val.pbin"):
        shutil.copy(folder / name, tmp_path)
    shutil.copytree(folder / "runs" / "online", tmp_path / "runs" / "online")
    shutil.rmtree(tmp_path / "runs" / "online" / "step-00000006")
    again = student(tmp_path, "online", DistillConfig(teacher=str(folder / "teacher"), weight=0.3))
    loop.train(again)
    assert torch.equal(weights(tmp_path / "runs" / "online"), weights(folder / "runs" / "online"))
    with pytest.raises(ValueError, match=r"was begun with distill.weight 0.3, not 0.5; give this run another --name"):
        loop.train(replace(again, distill=replace(again.distill, weight=0.5)))

    own = student(tmp_path, "own", DistillConfig(teacher=str(tmp_path / "teacher")), steps=3)
    loop.train(own)
    shutil.rmtree(tmp_path / "teacher")
    write_teacher(tmp_path / "teacher", norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"was begun with distill.teacher .*manifest.json, which has changed since; "):
        loop.train(own)


@tiny.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("compile", ["model", "block"])
def test_compiled_runs_are_the_same(folder: Path, compile: Literal["model", "block"]) -> None:
    base = student(folder, f"compiled-{compile}", DistillConfig(teacher=str(folder / "teacher"), weight=0.3))
    loop.train(replace(base, parallel=replace(base.parallel, compile=compile)))
    found, expected = (curve(folder / "runs" / name) for name in (base.name, "online"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_notes_of_all_words_teach_as_the_teacher_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = folder / "all.topk"
    evaluate.main(folder / "teacher", data=(str(folder / "train.pbin"),), save_topk=notes, topk=100)
    assert "100 words for each of 3,968 tokens in 124 sequences of 32 (continuous) of" in capsys.readouterr().out
    loop.train(student(folder, "offline", DistillConfig(teacher_topk=str(notes), weight=0.3)))
    found, expected = (curve(folder / "runs" / name) for name in ("offline", "online"))
    # float16 has 11 bits of each log-probability.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_a_note_is_of_the_teachers_words_after_its_token(folder: Path, tmp_path: Path) -> None:
    """Against the teacher's own logits, at a temperature, in the order in which training asks."""
    path, notes = str(folder / "train.pbin"), tmp_path / "some.topk"
    evaluate.main(folder / "teacher", data=(path,), save_topk=notes, topk=5, topk_temperature=2.0)
    data = student(folder, "x", DistillConfig()).data
    read = topk.open_notes(DistillConfig(teacher_topk=str(notes), temperature=2.0), data, 100)
    assert read is not None
    numbers = torch.tensor([77, 3, 123])
    found, tokens = read(numbers.numpy()), topk.open_sequences(data, path, "", 100).read(numbers.numpy())["inputs"]
    teacher = trained.load(folder / "teacher", CPU)
    with torch.no_grad():
        q = (loop.step.apply(teacher.model, teacher.params, tokens, False).double() / 2).softmax(-1)
    known, words = q.topk(5)
    assert torch.equal(found["teacher_words"], words.int())
    both = torch.cat((known, 1 - known.sum(-1, keepdim=True)), -1)
    torch.testing.assert_close(found["teacher_log_probs"].exp().double(), both, rtol=5e-3, atol=1e-5)


def test_fewer_words_still_teach(folder: Path) -> None:
    notes = folder / "few.topk"
    evaluate.main(folder / "teacher", data=(str(folder / "train.pbin"),), save_topk=notes, topk=8)
    loop.train(student(folder, "few", DistillConfig(teacher_topk=str(notes), weight=1.0), steps=20))
    found, all_words = curve(folder / "runs" / "few"), curve(folder / "runs" / "online")
    assert found[0, 2] < all_words[0, 2], "of fewer outcomes the divergence cannot be more"
    assert found[-1, 2] < 0.9 * found[0, 2]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": {"seq_len": 16}}, r"was made with seq_len 32, but data.seq_len is 16; change that, or make the file"),
        ({"data": {"document_mask": True}}, r"was made with document_mask False, but data.document_mask is True"),
        ({"data": {"train": "val.pbin"}}, r"was made for other data than .*val.pbin; make it anew with --save-topk"),
        ({"model": {"vocab_size": 101}}, r"was made with vocab_size 100, but model.vocab_size is 101"),
        ({"distill": {"temperature": 2.0}}, r"was made with temperature 1.0, but distill.temperature is 2.0"),
        ({"cut": -1}, r"is cut short or damaged; make it anew"),
        ({"cut": 30}, r"is no file of modalities.evaluate --save-topk"),
    ],
)
def test_notes_on_something_else_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    notes = folder / "two.topk"
    if not notes.exists():
        evaluate.main(folder / "teacher", data=(str(folder / "train.pbin"),), save_topk=notes, topk=2)
    given = tmp_path / "given.topk"
    given.write_bytes(notes.read_bytes()[: changes.get("cut")])
    base = student(folder, "refused", DistillConfig(teacher_topk=str(given), **changes.get("distill", {})))
    data = changes.get("data", {})
    data |= {"train": (str(folder / data["train"]),)} if "train" in data else {}
    base = replace(base, data=replace(base.data, **data), model=replace(base.model, **changes.get("model", {})))
    with pytest.raises(ValueError, match=problem) as caught:
        loop.train(base)
    assert "\n" not in str(caught.value) and not base.folder.exists()


def test_teachers_that_cannot_teach_are_refused(folder: Path, tmp_path: Path) -> None:
    base = student(folder, "refused", DistillConfig(teacher=str(folder / "teacher")))
    with pytest.raises(ValueError, match=r"teacher .* has a vocabulary of 100, but model.vocab_size is 90; a teacher"):
        loop.train(replace(base, model=replace(STUDENT, vocab_size=90)))
    with pytest.raises(ValueError, match=r"reads 16 tokens, but data.seq_len is 32; shorten that"):
        found = trained.find(folder / "teacher")
        recipe.teacher.check(replace(found, config=replace(found.config, max_seq_len=16)), STUDENT, "", 32)
    with pytest.raises(ValueError, match=r"holds no checkpoint; give a run"):
        loop.train(replace(base, distill=DistillConfig(teacher=str(tmp_path))))
    with pytest.raises(ValueError, match=r"distillation with parallel.tensor 2 is not there; set parallel.tensor 1"):
        recipe.teacher.check_recipe(base.distill, base.model, "", 32, tensor=2)
    assert not base.folder.exists()


def test_other_tokens_are_another_vocabulary(folder: Path, tmp_path: Path) -> None:
    """The same tokens in another tokenizer.json are the same vocabulary; the same number of others are not."""
    words = {"<eod>": 0} | {chr(0x100 + i): i for i in range(1, 100)}
    found = trained.find(folder / "teacher")
    theirs = write_words(tmp_path / "theirs.json", words)
    (tmp_path / "again.json").write_text(json.dumps(json.loads(theirs.read_text()), indent=3))
    others = write_words(tmp_path / "others.json", {word: (i + 1) % 100 for word, i in words.items()})
    teacher = replace(found, tokenizer=theirs)
    recipe.teacher.check(teacher, STUDENT, str(tmp_path / "again.json"), 32)
    with pytest.raises(ValueError, match=r"tokenizer .*theirs.json has other tokens than data.tokenizer .*others.json"):
        recipe.teacher.check(teacher, STUDENT, str(others), 32)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"teacher": "a", "teacher_topk": "b"}, "are both given; give one"),
        ({"weight": 0.0}, "distill.weight is 0.0, but must be more than 0"),
        ({"weight": 1.5}, "at most 1"),
        ({"temperature": 0.0}, "distill.temperature is 0.0, but must be positive"),
    ],
)
def test_impossible_settings(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DistillConfig(**values)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"topk": 101}, "--topk is 101, but must be between 1 and the model's vocab_size 100"),
        ({"samples": 3}, "--save-topk is of one whole file"),
        ({"topk_temperature": 0.0}, "--topk-temperature is 0.0"),
    ],
)
def test_notes_that_cannot_be_made(folder: Path, tmp_path: Path, flags: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        evaluate.main(folder / "teacher", data=(str(folder / "train.pbin"),), save_topk=tmp_path / "n", **flags)
    assert not (tmp_path / "n").exists()


def test_a_dry_run_counts_the_teacher_and_checks_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = student(folder, "dry", DistillConfig(teacher=str(folder / "teacher")))
    recipe.dry_run(base)
    assert "teacher 0" in capsys.readouterr().out  # MiB
    theirs = recipe.memory_per_rank(base, 1)["teacher"]
    # fp32 here: its weights, the hidden states of 2 sequences of 32 tokens, and the logits of a chunk.
    assert theirs == 4 * (recipe.num_params(tiny.MODEL) + 2 * 32 * 32 + 512 * 100)
    with pytest.raises(ValueError, match="has a vocabulary of 100, but model.vocab_size is 90"):
        recipe.dry_run(replace(base, model=replace(STUDENT, vocab_size=90)))
