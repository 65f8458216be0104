"""`wan_jax.captions`: plain prompts become what the models were trained on; wrong ones are refused with the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wan_jax.captions import clean_caption, mark_speech, ovi_prompt, strip_tags, structured_caption
from wan_jax.errors import InputError

GOLDEN = json.loads((Path(__file__).parent / "goldens/audio/text_and_sizes.json").read_text(encoding="utf-8"))
CAPTION = GOLDEN["dreamid_caption_clean"][0]


def test_the_caption_of_the_documentation() -> None:
    prompt = 'Character1 says "We did it!" to character2, who laughs, in a sunny kitchen'
    assert structured_caption(prompt, [None, "a woman with  short\nred hair."]) == (
        "<img1>: the subject of reference 1, <sub1>\n"
        "<img2>: a woman with short red hair, <sub2>\n"
        "<sub1> says <S>We did it!<E> to <sub2>, who laughs, in a sunny kitchen"
    )


@pytest.mark.parametrize(
    "name",
    ["character1", "Character1", "CHARACTER1", "Character 1", "character 1", "Image 1", "image1", "@Image1", "@image1",
     "Video 1", "video1", "@Video 1", "character01"],
)  # fmt: skip
def test_every_spelling_of_a_reference(name: str) -> None:
    caption = structured_caption(f"{name}'s dog, and {name}.", [" "])
    assert caption == "<img1>: the subject of reference 1, <sub1>\n<sub1>'s dog, and <sub1>."


def test_references_are_counted_overall() -> None:
    text = structured_caption("Image 1 hugs Video 2 and 让character3说", [None] * 3).splitlines()[-1]
    assert text == "<sub1> hugs <sub2> and 让<sub3>说"


@pytest.mark.parametrize(
    "text",
    ["the main character", "in the video 3 people dance", "image 9 of many", "characters12", "MyImage9", "video12b"],
)
def test_other_words_stay(text: str) -> None:
    assert structured_caption(text, [None]).splitlines()[-1] == text


def test_names_inside_speech_are_spoken() -> None:
    text = structured_caption('character1: "Hello character7, it\'s me" and waves', [None]).splitlines()[-1]
    assert text == "<sub1>: <S>Hello character7, it's me<E> and waves"


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ('He says "Hi" and “ Bye. ”', "He says <S>Hi<E> and <S>Bye.<E>"),
        ("it's the dogs' 'own' ’tis", "it's the dogs' 'own' ’tis"),
        ("no speech", "no speech"),
        ("<S>Hi<E> in the film \"Up\"", "<S>Hi<E> in the film \"Up\""),
        ('two\n"lines\nof speech"', "two\n<S>lines\nof speech<E>"),
    ],
)
def test_quotes_are_speech_once(text: str, marked: str) -> None:
    assert mark_speech(text) == marked == mark_speech(marked)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a 6" screen', r'mark " in \.\.\.a 6" screen\.\.\. has no partner'),
        ('"Hi" and "Bye', "no partner"),
        ("“Hi", "no partner"),
        ("Hi” “", "no partner"),
        ("“Hi\"", "no partner"),
        ("<S>Hi", "last <S> of the prompt has no <E>"),
        ("Hi<E>", "<E> in .*expected <S>"),
        ("<S>Hi <S>Bye<E>", "<S> in .*expected <E>"),
        ("<S>Hi<E> Bye<E>", "<E> in .*expected <S>"),
    ],
)
def test_speech_without_its_end_is_refused(text: str, message: str) -> None:
    for function in (mark_speech, lambda text: structured_caption(text, [None])):
        with pytest.raises(InputError, match=message):
            function(text)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("character3 waves", 2, "character3 in the prompt: 2 references are given; use character2 or add"),
        ("Image 4 waves", 1, "Image 4 in the prompt: 1 reference is given; use Image 1 or add"),
        ("character0 waves", 2, "use character1 or add"),
        ("character1 waves", 0, "no reference is given; add a reference"),
        ("<sub3> waves", 2, "<sub3> in the prompt: 2 references are given; use <sub2>"),
        ("<img3>: a man <sub1>", 2, "use <img2>"),
    ],
)
def test_numbers_without_a_reference_are_refused(text: str, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        structured_caption(text, [None] * count)


def test_a_structured_caption_passes_through(caplog: pytest.LogCaptureFixture) -> None:
    assert structured_caption(CAPTION["in"], [None]) == CAPTION["out"]
    assert structured_caption(CAPTION["out"], [None]) == CAPTION["out"]
    plain = "<sub1> reads \"Up\" to character9"
    assert structured_caption(plain, [None]) == plain
    assert not caplog.records
    assert structured_caption(CAPTION["in"], ["a woman"]) == CAPTION["out"]
    assert "its own descriptions hold" in caplog.text
    with pytest.raises(InputError, match="has no <E>"):
        structured_caption(CAPTION["in"].replace("<E>", ""), [None])


def test_cleaning_leaves_other_brackets() -> None:
    assert clean_caption("a [b] [C_D] [E1]\n \n\nf") == "a [b]  [E1]\nf"


def test_sound_tags_take_the_form_of_the_checkpoint() -> None:
    both = "A <AUDCAP>b<ENDAUDCAP> c <AUDCAP>d\ne<ENDAUDCAP>"
    assert ovi_prompt(both, "audcap") == both
    assert ovi_prompt(both, "audio") == "A Audio: b c Audio: d\ne"
    assert ovi_prompt("A. Audio: \n b. Audio: c", "audcap") == "A. <AUDCAP>b. Audio: c<ENDAUDCAP>"
    assert strip_tags(both + " <S>f<E> g") == "A  c   g"
    with pytest.raises(InputError, match="audcap, audio"):
        ovi_prompt(both, "720")
