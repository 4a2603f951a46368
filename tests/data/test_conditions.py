"""Conditions besides the class: from manifest cells and requests to vectors, and clear errors."""

import json

import pytest

from medgen.config import Preprocess
from medgen.data.conditions import (
    ConditionSpace,
    join_findings,
    parse_number,
    parse_request,
    split_findings,
)
from medgen.errors import UserError

CONDITIONS = {
    "findings": {"kind": "multilabel"},
    "sex": {"kind": "category"},
    "mask": {"kind": "mask"},
    "age": {"kind": "number", "low": 20, "high": 120},
}
TRAIN = [
    {"findings": "Effusion|Mass", "sex": "M", "age": "40"},
    {"findings": "No Finding", "sex": "F", "age": ""},
    {"findings": "Atelectasis+Effusion", "sex": "", "age": "070Y"},
]
UNKNOWN = {"findings": [0, 0, 0, 0], "sex": [0, 0, 0], "age": [0, 0]}


@pytest.fixture(scope="module")
def space() -> ConditionSpace:
    found = ConditionSpace.from_rows(Preprocess(conditions=CONDITIONS), TRAIN)
    assert found is not None
    return found


def vector(**known: list[float]) -> list[float]:
    """A vector in which all other conditions are unknown."""
    return [value for name in UNKNOWN for value in known.get(name, UNKNOWN[name])]


def test_values_are_those_of_the_train_split(space: ConditionSpace) -> None:
    assert {field.name: field.values for field in space.fields} == {
        "findings": ("Atelectasis", "Effusion", "Mass"), "sex": ("F", "M"), "mask": (), "age": (),
    }  # fmt: skip
    assert (space.size, space.map_channels) == (9, 2)
    assert ConditionSpace.load(json.loads(json.dumps(space.dump()))) == space
    assert ConditionSpace.from_rows(Preprocess(), TRAIN) is None
    assert ConditionSpace.load([]) is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, vector()),
        ({"findings": "Mass|Effusion"}, vector(findings=[1, 0, 1, 1])),
        ({"findings": "No Finding"}, vector(findings=[1, 0, 0, 0])),
        ({"findings": "no_finding"}, vector(findings=[1, 0, 0, 0])),
        ({"findings": "Hernia|Mass"}, vector()),  # not in the train split
        ({"sex": "M", "age": "20"}, vector(sex=[1, 0, 1], age=[1, 0])),
        ({"age": "045Y"}, vector(age=[1, 0.25])),
        ({"age": "414"}, vector()),  # a typing error in ChestX-ray14
    ],
)
def test_cells_of_a_manifest(space: ConditionSpace, row: dict[str, str], expected: list[float]) -> None:
    assert space.encode(row) == expected
    assert space.encode_rows([row]).tolist() == [expected]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("", vector()),
        ("age=70", vector(age=[1, 0.5])),
        ("sex=f, findings='effusion+ATELECTASIS'", vector(sex=[1, 1, 0], findings=[1, 1, 1, 0])),
        ('findings="No Finding",age=120', vector(findings=[1, 0, 0, 0], age=[1, 1])),
        ({"findings": ["mass"], "age": 45}, vector(findings=[1, 0, 0, 1], age=[1, 0.25])),
        ({"findings": []}, vector(findings=[1, 0, 0, 0])),
    ],
)
def test_requests(space: ConditionSpace, request_: object, expected: list[float]) -> None:
    wanted = parse_request(request_) if isinstance(request_, str) else request_
    assert space.encode_request(wanted) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("view=AP", "condition: unknown name 'view'; Known: findings, sex, mask, age"),
        ("finding=mass", "did you mean 'findings'"),
        ("findings=efusion", "findings: unknown value 'efusion'; did you mean 'Effusion'.*Mass, joined by [+]"),
        ("sex=x", "sex: unknown value 'x'; Expected one of F, M"),
        ("age=130", "age: found '130'; expected a number from 20 to 120"),
        ("age=old", "age: found 'old'"),
        ("age", "found 'age', expected NAME=VALUE"),
        ("age=", "expected NAME=VALUE"),
        ("age=30,sex=M,age=40", "age is given twice"),
        ({"age": True}, "age: found True"),
        ({"sex": ["F", "M"]}, "sex: found 2 values; expected one of F, M"),
    ],
)
def test_wrong_requests_are_refused(space: ConditionSpace, request_: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        space.encode_request(parse_request(request_) if isinstance(request_, str) else request_)  # type: ignore[arg-type]


def test_a_value_may_contain_commas_and_equals_signs() -> None:
    assert parse_request("mask=a,b=.png,view=PA, AP") == {"mask": "a", "b": ".png", "view": "PA, AP"}
    assert parse_request("mask=iVBORw0KGgo=,sex=F") == {"mask": "iVBORw0KGgo=", "sex": "F"}


@pytest.mark.parametrize(
    ("text", "years"), [("63", 63), ("063Y", 63), ("18M", 1.5), ("026W", 0.5), ("73D", 0.2), ("-1.5", -1.5)]
)
def test_numbers_and_ages(text: str, years: float) -> None:
    assert parse_number(text) == years


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "12 years"])
def test_other_texts_are_no_numbers(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_number(text)


@pytest.mark.parametrize("names", [[], ["mass"], ["mass", "nodule"]])
def test_findings_are_read_as_they_are_written(names: list[str]) -> None:
    assert split_findings(join_findings(names)) == names


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"age": {"kind": "number"}}, "kind number needs low below high"),
        ({"age": {"kind": "number", "low": 9, "high": 9}}, "kind number needs low below high"),
        ({"sex": {"kind": "category", "low": 1}}, "low and high are for kind number"),
        ({"label": {"kind": "category"}}, "label is a column with another meaning"),
        ({"mask": {"kind": "category"}}, "mask is a column with another meaning"),
        ({"a": {"kind": "mask"}, "mask": {"kind": "mask"}}, "found 2 of kind mask"),
        ({"edges": {"kind": "image"}}, "kind image needs a folder, and no other kind has one; found image, None"),
        ({"sex": {"kind": "category", "folder": "sex"}}, "no other kind has one; found category, sex"),
        ({"edges": {"kind": "image", "folder": "../edges"}}, "pattern"),
        (
            {"a": {"kind": "image", "folder": "t1"}, "b": {"kind": "image", "folder": "T1"}},
            "a, b need different folders",
        ),
        ({"age": {"kind": "image", "folder": "ages"}}, "age is a column with another meaning"),
        ({"Sex": {"kind": "category"}}, "pattern"),
        ({"sex": {}}, "Field required"),
    ],
)
def test_wrong_conditions_are_refused(conditions: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(conditions=conditions)


def test_a_mask_alone_has_empty_vectors() -> None:
    space = ConditionSpace.from_rows(Preprocess(conditions={"mask": {"kind": "mask"}}), TRAIN)
    assert space is not None
    assert (space.encode_rows(TRAIN).shape, space.encode_request({})) == ((3, 0), [])


def test_maps_have_channels_and_no_place_in_the_vector() -> None:
    kinds = {"t1": {"kind": "image", "folder": "T1"}, "sex": {"kind": "category"}, "tumour": {"kind": "mask"}}
    kinds |= {"t2": {"kind": "image", "folder": "T2"}}
    space = ConditionSpace.from_rows(Preprocess(conditions=kinds, mask_values=(0, 1, 2)), TRAIN)
    assert space is not None
    places = {name: (place.start, place.stop) for name, (_, place) in space.map_fields.items()}
    assert places == {"t1": (0, 2), "tumour": (2, 5), "t2": (5, 7)}
    assert (space.map_channels, list(space.vector_fields), space.size) == (7, ["sex"], 3)
    assert [field.name for field in space.images] == ["t1", "t2"]
    assert ConditionSpace.load(json.loads(json.dumps(space.dump()))) == space


def test_other_kinds_are_dumped_without_a_folder() -> None:
    """So that stores and models of earlier versions keep their bytes."""
    dumped = Preprocess(conditions={**CONDITIONS, "edges": {"kind": "image", "folder": "edges"}}).model_dump()
    assert [name for name, condition in dumped["conditions"].items() if "folder" in condition] == ["edges"]
    assert dumped["conditions"]["sex"] == {"kind": "category", "low": None, "high": None}


def test_a_section_without_conditions_has_the_values_of_earlier_versions() -> None:
    assert "conditions" not in Preprocess().model_dump()
    assert "conditions" in Preprocess(conditions={"sex": {"kind": "category"}}).model_dump()
