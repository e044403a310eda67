"""Prompt templates, put on and taken off."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo_megatron.data.row_files import read_rows
from r2vpo_megatron.data.templates import PROMPT_TEMPLATES, take_off_templates

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@given(problem=st.text(), name=st.sampled_from(sorted(PROMPT_TEMPLATES)))
def test_strip_undoes_apply(problem: str, name: str) -> None:
    template = PROMPT_TEMPLATES[name]
    assert template.strip(template.apply(problem)) == problem


def test_what_lacks_a_template_is_not_stripped() -> None:
    dapo, boxed = PROMPT_TEMPLATES["dapo"], PROMPT_TEMPLATES["boxed"]
    whole = dapo.apply("x")
    assert dapo.strip(whole[1:]) is None
    assert dapo.strip(whole[:-1]) is None
    assert dapo.strip(dapo.prefix) is None
    assert boxed.strip("a problem") is None
    # Prefix and suffix may not share characters.
    assert dapo.strip(dapo.prefix.removesuffix("\n\n") + dapo.suffix) is None


def test_a_message_shows_its_template() -> None:
    for name, template in PROMPT_TEMPLATES.items():
        assert take_off_templates(template.apply("What is 1+1?")) == ("What is 1+1?", name)
        # Blanks around the message or the problem do not hide it.
        message = f" {template.apply(' What? ')}\n"
        assert take_off_templates(message) == ("What?", name)


def test_a_template_inside_another_comes_off_as_well() -> None:
    dapo, boxed = PROMPT_TEMPLATES["dapo"], PROMPT_TEMPLATES["boxed"]
    assert take_off_templates(boxed.apply(dapo.apply("What?"))) == ("What?", "boxed")
    assert take_off_templates(dapo.apply(boxed.apply("What?"))) == ("What?", "dapo")
    assert take_off_templates(dapo.apply(" ")) == ("", "dapo")


def test_names_and_answer_forms() -> None:
    forms = {name: template.answer_form for name, template in PROMPT_TEMPLATES.items()}
    assert forms == {"dapo": "answer_line", "boxed": "boxed", "plain": ""}
    assert "\\boxed{}" in PROMPT_TEMPLATES["boxed"].suffix


def test_the_published_rows_have_the_dapo_template() -> None:
    path = SHARED / "aime-2024__DAPO.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    for _, row in read_rows(path):
        message = row["prompt"][0]["content"]
        assert PROMPT_TEMPLATES["dapo"].strip(message) == row["extra_info"]["raw_problem"]
