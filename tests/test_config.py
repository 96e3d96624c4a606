"""Configs to JSON and back, and what is said about wrong ones."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from modalities import recipe as recipes
from modalities.config import differences, from_dict, to_dict
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))


@dataclass(frozen=True, kw_only=True)
class Inner:
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    rate: float = 0.5
    on: bool = False
    text: str = ""
    maybe: int | None = None
    size: int | Literal["auto"] = 1
    again: bool | int = True
    ratio: float | int = 0.5
    many: tuple[int, ...] = ()
    rules: tuple[tuple[str, float], ...] = ()
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    level: Literal[1, 2] = 1


def complaint(cls: type, values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        from_dict(cls, values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_goes_through_json_and_back(path: Path) -> None:
    recipe, source = recipes.load(str(path))
    assert source == path and recipe.name == path.stem
    text = json.dumps(to_dict(recipe))
    again = from_dict(Recipe, json.loads(text))
    assert again == recipe
    assert json.dumps(to_dict(again)) == text
    assert list(differences(recipe, again)) == []


def test_a_recipe_json_is_loaded_as_it_was_written(tmp_path: Path) -> None:
    recipe, _ = recipes.load(str(RECIPES[0]))
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    assert recipes.load(str(tmp_path / "recipe.json")) == (recipe, tmp_path / "recipe.json")


def test_every_kind_of_field_survives() -> None:
    outer = Outer(
        count=-3,
        rate=1e-300,
        on=True,
        text='a "quoted" line\n…',
        maybe=7,
        size="auto",
        again=2,
        ratio=3,
        many=(1, 2, 3),
        rules=((r".*\.weight", 1.0), ("", 0.0)),
        inner=Inner(kind="b", pair=(0, 0.1)),
        inners=(Inner(), Inner(kind="b")),
    )
    assert from_dict(Outer, json.loads(json.dumps(to_dict(outer)))) == outer


def test_a_field_left_out_takes_its_default() -> None:
    assert from_dict(Outer, {"count": 1, "inner": {"kind": "b"}}) == Outer(count=1, inner=Inner(kind="b"))


def test_null_is_allowed_where_the_type_says_so() -> None:
    assert from_dict(Outer, {"count": 1, "maybe": None}).maybe is None
    assert complaint(Outer, {"count": None}) == "count is None, but should be int"


@pytest.mark.parametrize(
    ("name", "values"),
    [("maybe", [None, 3]), ("size", [4, "auto"]), ("again", [True, False, 0, 1, 2]), ("ratio", [1, 1.0])],
)
def test_of_several_types_a_value_keeps_its_own(name: str, values: list[Any]) -> None:
    for value in values:
        found = getattr(from_dict(Outer, {"count": 1, name: value}), name)
        assert found == value and type(found) is type(value)


def test_an_int_is_taken_for_a_float_and_becomes_one() -> None:
    outer = from_dict(Outer, {"count": 1, "rate": 2, "rules": [["a", 1]], "inner": {"pair": [1, 3]}})
    numbers = (outer.rate, outer.rules[0][1], outer.inner.pair[1])
    assert numbers == (2.0, 1.0, 3.0) and {type(number) for number in numbers} == {float}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"count": True}, "count is True, but should be int"),
        ({"count": 1.0}, "count is 1.0, but should be int"),
        ({"count": "1"}, "count is '1', but should be int"),
        ({"count": 1, "rate": True}, "rate is True, but should be float"),
        ({"count": 1, "rate": "fast"}, "rate is 'fast', but should be float"),
        ({"count": 1, "on": 1}, "on is 1, but should be bool"),
        ({"count": 1, "text": 1}, "text is 1, but should be str"),
        ({"count": 1, "maybe": "x"}, "maybe is 'x', but should be int or None"),
        ({"count": 1, "size": "all"}, "size is 'all', but should be int or 'auto'"),
        ({"count": 1, "size": True}, "size is True, but should be int or 'auto'"),
        ({"count": 1, "again": 2.0}, "again is 2.0, but should be bool or int"),
        ({"count": 1, "level": True}, "level is True, but should be one of 1, 2"),
        ({"count": 1, "many": [1, "x"]}, "many[1] is 'x', but should be int"),
        ({"count": 1, "inner": {"pair": [1, "x"]}}, "inner.pair[1] is 'x', but should be float"),
        ({"count": 1, "many": "12"}, "many is '12', but should be tuple[int, ...]"),
        ({"count": 1, "inners": [{}, {"pair": [1, "x"]}]}, "inners[1].pair[1] is 'x', but should be float"),
        ({"count": 1, "inners": {}}, "inners is {}, but should be tuple["),
        ({"count": 1, "inner": 3}, "inner should be a JSON object, not 3"),
        ({"count": 1, "speed": 3}, "unknown field speed; Outer has count, rate"),
        ({"count": 1, "inner": {"kin": "a"}}, "unknown field inner.kin; Inner has kind, pair"),
        ([], "Outer should be a JSON object, not []"),
    ],
)
def test_a_wrong_value_is_named(values: Any, what: str) -> None:
    assert complaint(Outer, values).startswith(what)


def test_a_bad_choice_is_answered_with_the_choices() -> None:
    what = complaint(Outer, {"count": 1, "inner": {"kind": "c"}})
    assert what.startswith("inner.kind is 'c'") and "'a'" in what and "'b'" in what


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"inner": {"pair": [1]}}, "inner.pair is [1]"),
        ({"inner": {"pair": [1, 2, 3]}}, "inner.pair is [1, 2, 3]"),
        ({"inner": {"pair": 1}}, "inner.pair is 1"),
        ({"rules": [["a", 1.0], ["b"]]}, "rules[1] is ['b']"),
    ],
)
def test_a_tuple_of_another_length_is_answered_with_its_type(values: Any, field: str) -> None:
    what = complaint(Outer, {"count": 1, **values})
    assert what.startswith(field) and "float" in what, what


def test_missing_required_fields_are_named() -> None:
    assert "'count'" in complaint(Outer, {})
    assert "'model'" in complaint(Recipe, {"steps": 1})
    what = complaint(Recipe, {"steps": 1, "model": {"vocab_size": 5}})
    assert what.startswith("model") and all(name in what for name in ("'num_layers'", "'width'", "'num_heads'"))


def test_a_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for text, what in {
        '{"steps": 1, "modl": {}}': "unknown field modl",
        '{"steps": 1,': "is not JSON",
        '{"steps": 1, "optim": {"betas": [1, 2]}}': "optim.betas is (1.0, 2.0)",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=what.replace("(", r"\(").replace(")", r"\)")) as caught:
            recipes.load(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_differences_names_every_field_that_differs() -> None:
    one = Outer(count=1, inner=Inner(pair=(1, 2.0)))
    other = replace(one, count=2, rules=(("a", 1.0),), inner=Inner(pair=(1, 3.0)))
    assert list(differences(one, one)) == []
    assert list(differences(one, other)) == [
        ("count", 1, 2),
        ("rules", (), (("a", 1.0),)),
        ("inner.pair", (1, 2.0), (1, 3.0)),
    ]
    slower = OptimConfig(schedule=ScheduleConfig(warmup=5))
    assert list(differences(OptimConfig(), slower, "optim.")) == [("optim.schedule.warmup", 0, 5)]
