"""Prompts as the models with sound were trained on them: speech in <S> and <E>, subjects as <sub1>, Ovi's sound tags.

Sources: the formatters and ``clean_text`` of Ovi, the caption cleaning in DreamID-Omni's ``inference_r2av.py``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from wan_jax.errors import InputError

log = logging.getLogger(__name__)

STYLES = ("audcap", "audio")

_AUDCAP = re.compile(r"<AUDCAP>(.*?)<ENDAUDCAP>", re.DOTALL)
_AUDIO = re.compile(r"Audio:\s*(.*)", re.DOTALL)
_SPEECH = re.compile(r"<S>.*?<E>", re.DOTALL)
_QUOTED = re.compile(r'"([^"“”]*)"|“([^"“”]*)”')
_HIDDEN = [
    re.compile(rf"\[{name}_START\].*?\[{name}_END\]", re.DOTALL) for name in ("SPEAKER_TIMESTAMPS", "AUDIO_DESCRIPTION")
]
_STRUCTURE = re.compile(r"<(?:sub|img)\d+>|\[[A-Z_]+_START\]")
_TAG = re.compile(r"<(sub|img)(\d+)>")
# With a blank before the number, `image` and `video` need their capital: "in the video 3 people dance".
_NAME = re.compile(
    r"(?<![A-Za-z0-9_])@?(?P<word>(?i:character) ?|(?i:image|video)|(?:Image|Video) )(?P<number>\d+)(?![A-Za-z0-9_])"
)


def ovi_prompt(text: str, style: str) -> str:
    """The description of the sound in the form that an Ovi checkpoint knows; the other form is rewritten.

    Args:
        style: "audcap" (720x720_5s): ``<AUDCAP>...<ENDAUDCAP>``; "audio" (both 960x960): ``Audio: ...`` up to the end.
    """
    if style not in STYLES:
        raise InputError(f"style={style!r}: need one of {', '.join(STYLES)}")
    if style == "audcap":
        return _AUDIO.sub(r"<AUDCAP>\1<ENDAUDCAP>", text)
    return _AUDCAP.sub(r"Audio: \1", text)


def strip_tags(text: str) -> str:
    """What is left of an Ovi prompt for a model of still pictures: no speech, no description of the sound."""
    for tagged in (_SPEECH, _AUDCAP, _AUDIO):
        text = tagged.sub("", text)
    return text.strip()


def mark_speech(text: str) -> str:
    """Put quoted speech between <S> and <E>. A prompt that has such tags already is only checked.

    All text in double quotation marks, straight or curly, is taken as speech: a title in quotes cannot be told from it.
    Single quotes are apostrophes and stay.

    Raises:
        InputError: a quotation mark without its partner, or <S> and <E> that do not alternate.
    """
    if "<S>" in text or "<E>" in text:
        _check_tags(text)
        return text
    marked = _QUOTED.sub(lambda match: f"<S>{(match[1] or match[2] or '').strip()}<E>", text)
    if single := re.search('["“”]', marked):
        where = marked[max(0, single.start() - 20) : single.end() + 20]
        raise InputError(
            f"the quotation mark {single[0]} in ...{where}... has no partner: what is said stands between two of them; "
            "write inches and the like in words"
        )
    return marked


def clean_caption(text: str) -> str:
    """The part of a structured caption that the model sees, as DreamID-Omni's script cuts it.

    The sections SPEAKER_TIMESTAMPS and AUDIO_DESCRIPTION go, so do the names of the others, and blank lines.
    """
    for section in _HIDDEN:
        text = section.sub("", text)
    return re.sub(r"\n\s*\n", "\n", re.sub(r"\[[A-Z_]+\]", "", text)).strip()


def structured_caption(prompt: str, descriptions: Sequence[str | None]) -> str:
    """The caption that DreamID-Omni sees for a prompt in plain words.

    A line ``<img1>: description, <sub1>`` for every reference, then the prompt: ``character1``, ``Character 1``,
    ``Image 1``, ``@Image1`` or ``Video 1`` outside of speech become ``<sub1>`` (whatever the word, the number counts
    all references in order), quoted speech becomes ``<S>...<E>`` (`mark_speech`). A prompt with ``<sub1>``, ``<img1>``
    or bracketed sections is such a caption already: it is checked and cleaned (`clean_caption`), nothing else.

    Args:
        descriptions: of each reference; None or blank makes it "the subject of reference 1".
    Raises:
        InputError: a number without a reference, or speech marks that do not pair.
    """
    if _STRUCTURE.search(prompt):
        if any(descriptions):
            log.warning("the prompt is a structured caption: its own descriptions hold, those of the references do not")
        caption = clean_caption(prompt)
        _check_tags(caption)
        for match in _TAG.finditer(caption):
            _check_number(match[0], int(match[2]), len(descriptions), f"<{match[1]}{{}}>")
        return caption

    def subject(match: re.Match[str]) -> str:
        _check_number(match[0], int(match["number"]), len(descriptions), match["word"] + "{}")
        return f"<sub{int(match['number'])}>"

    parts = re.split(f"({_SPEECH.pattern})", mark_speech(prompt).strip(), flags=re.DOTALL)  # odd ones are speech
    parts[::2] = [_NAME.sub(subject, part) for part in parts[::2]]
    lines = []
    for k, description in enumerate(descriptions, 1):
        text = " ".join((description or "").split()).rstrip(".,")
        lines.append(f"<img{k}>: {text or f'the subject of reference {k}'}, <sub{k}>")
    return "\n".join([*lines, "".join(parts)])


def _check_tags(text: str) -> None:
    expected = "<S>"
    for match in re.finditer("<[SE]>", text):
        if match[0] != expected:
            where = text[max(0, match.start() - 20) : match.end() + 20]
            raise InputError(f"{match[0]} in ...{where}...: expected {expected}; speech is written <S>words<E>")
        expected = "<E>" if expected == "<S>" else "<S>"
    if expected == "<E>":
        raise InputError("the last <S> of the prompt has no <E>: speech is written <S>words<E>")


def _check_number(name: str, number: int, count: int, spelling: str) -> None:
    if not 1 <= number <= count:
        given = {0: "no reference is", 1: "1 reference is"}.get(count, f"{count} references are")
        fix = f"use {spelling.format(min(max(number, 1), count))} or add a reference" if count else "add a reference"
        raise InputError(f"{name} in the prompt: {given} given; {fix}")
