"""Templates: how the fields, soft tokens and answer of an example become one row of token ids.

    [X] is [P1] and [P2] [Y]

`[name]` is a field, `[P1]`, `[P2]`... are soft tokens, `[Y]` is the answer, the rest is literal text; `[[` and `]]` are
literal brackets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

IGNORE = -100  # the label of a position that is not an answer

_TOKEN = re.compile(r"\[\[|\]\]|\[(?P<slot>[A-Za-z_]\w*)\]|[\[\]]|[^\[\]]+")
_SOFT = re.compile(r"P(\d+)")
_RESERVED = ("answer", "tokenizer", "self")


@dataclass(frozen=True)
class Text:
    """Literal text."""

    text: str

    def __str__(self) -> str:
        return self.text.replace("[", "[[").replace("]", "]]")


@dataclass(frozen=True)
class Field:
    """A named input; its text comes with each example."""

    name: str

    def __str__(self) -> str:
        return f"[{self.name}]"


@dataclass(frozen=True)
class Soft:
    """Soft token number 1, 2, ...; its id is `-number`."""

    number: int

    def __str__(self) -> str:
        return f"[P{self.number}]"


@dataclass(frozen=True)
class Answer:
    """The position of the answer, at the end."""

    def __str__(self) -> str:
        return "[Y]"


Piece = Text | Field | Soft | Answer


@dataclass(frozen=True)
class Template:
    """A parsed template; `str` returns a text that parses to it.

    Examples:
        >>> template = softkv.Template.parse("[P1] [text] is [P2] [Y]")
        >>> template.fields, template.soft_tokens
        (('text',), 2)
        >>> template.encode(tokenizer, text="w5 w6", answer="w7")["input_ids"]  # soft tokens: -1, -2
        [1, -1, 5, 6, 2, -2, 7]
    """

    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        return "".join(map(str, self.pieces))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in order of appearance."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces if isinstance(piece, Field)))

    @property
    def soft_tokens(self) -> int:
        """The number of soft tokens."""
        return sum(isinstance(piece, Soft) for piece in self.pieces)

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(template: str) -> Template:
        """Read a template.

        Raises:
            ValueError: if there is no `[Y]` or more than one, text follows it, soft tokens are not numbered 1, 2, ...
                without gaps or repetitions, a bracket is unmatched, or a field has a reserved name.
        """
        pieces: list[Piece] = []
        for match in _TOKEN.finditer(template):
            piece = _piece(match, template)
            if isinstance(piece, Text) and pieces and isinstance(pieces[-1], Text):
                piece = Text(pieces.pop().text + piece.text)  # type: ignore[union-attr]
            pieces.append(piece)
        answers = [at for at, piece in enumerate(pieces) if isinstance(piece, Answer)]
        if not answers:
            raise ValueError(f"the template {template!r:.300} has no answer: write [Y] at its end")
        if len(answers) > 1:
            raise ValueError(f"the template {template!r:.300} has {len(answers)} answers, expected one [Y]")
        if answers[0] != len(pieces) - 1:
            rest = "".join(map(str, pieces[answers[0] + 1 :]))
            raise ValueError(
                f"{rest!r:.300} follows [Y] in the template {template!r:.300}: a causal model can't read past its "
                "answer, so [Y] must be last"
            )
        numbers = sorted(piece.number for piece in pieces if isinstance(piece, Soft))
        if numbers != list(range(1, len(numbers) + 1)):
            found = " ".join(f"[P{number}]" for number in numbers)
            raise ValueError(
                f"the template {template!r:.300} has the soft tokens {found!s:.300}, expected each of "
                f"[P1] to [P{len(numbers)}] once"
            )
        return Template(tuple(pieces))

    def encode(self, tokenizer: Any, *, answer: str | None = None, **fields: str) -> dict[str, list[int]]:
        """One example as `{"input_ids", "labels"}`; see `Method.encode`.

        Pieces are tokenised separately. White space next to a soft token is dropped; a space before a field or `[Y]` is
        tokenised with its text (one space, even if the text starts with one). The row starts with the tokenizer's
        leading special tokens (a BOS if it adds one); nothing is added at its end.
        """
        self._check_fields(fields)
        input_ids = begin_ids(tokenizer)
        starts = tokenizer("a", add_special_tokens=False)["input_ids"]
        # SentencePiece tokenizers prepend a space to whatever they tokenise.
        adds_space = tokenizer.convert_ids_to_tokens(starts[:1])[:1] in (["▁"], ["▁a"])

        def ids(text: str) -> list[int]:
            return tokenizer(text.removeprefix(" ") if adds_space else text, add_special_tokens=False)["input_ids"]

        for piece, space in self._spaced():
            if isinstance(piece, Soft):
                input_ids = [*input_ids, -piece.number]
            elif isinstance(piece, Text):
                input_ids = input_ids + ids(piece.text)
            elif isinstance(piece, Field):
                input_ids = input_ids + ids(_with_space(fields[piece.name], space))
            elif answer is not None:
                answer_ids = ids(_with_space(answer, space))
                if not answer_ids:
                    raise ValueError(
                        f"the answer {answer!r} holds no token: give a text, or answer=None for a prompt alone"
                    )
                labels = [IGNORE] * len(input_ids) + answer_ids
                return {"input_ids": input_ids + answer_ids, "labels": labels}
        return {"input_ids": input_ids, "labels": [IGNORE] * len(input_ids)}

    def _check_fields(self, fields: dict[str, str]) -> None:
        wanted = ", ".join(self.fields) or "none"
        if unknown := [name for name in fields if name not in self.fields]:
            hint = "; the text of [Y] is given as answer=" if "Y" in unknown else ""
            raise ValueError(f"the template {str(self)!r} has no field {', '.join(unknown)} (it has {wanted}){hint}")
        if missing := [name for name in self.fields if name not in fields]:
            raise ValueError(f"the template {str(self)!r} needs a text for {', '.join(missing)}")
        for name, text in fields.items():
            if not isinstance(text, str):
                raise ValueError(f"field {name} expects a text, got {type(text).__name__}")

    def _spaced(self) -> list[tuple[Piece, bool]]:
        """The pieces with white space resolved: whether each field or answer starts with a space, and no white space
        next to a soft token."""
        spaced: list[tuple[Piece, bool]] = []
        for at, piece in enumerate(self.pieces):
            before = self.pieces[at - 1] if at else None
            after = self.pieces[at + 1] if at + 1 < len(self.pieces) else None
            if isinstance(piece, Text):
                text = piece.text
                if isinstance(after, Field | Answer):
                    text = text.removesuffix(" ")
                if isinstance(after, Soft):
                    text = text.rstrip()
                if isinstance(before, Soft):
                    text = text.lstrip()
                if text:
                    spaced.append((Text(text), False))
            else:
                spaced.append((piece, isinstance(before, Text) and before.text.endswith(" ")))
        return spaced


def begin_ids(tokenizer: Any) -> list[int]:
    """The ids with which a tokenizer starts every text (a BOS, or nothing)."""
    return leading_special_ids(tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"])


def end_ids(tokenizer: Any) -> list[int]:
    """The ids with which a tokenizer ends every text (an EOS, or nothing)."""
    ids, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return whole[len(leading_special_ids(ids, whole)) + len(ids) :]


def leading_special_ids(ids: list[int], with_special: list[int]) -> list[int]:
    """The ids that a tokenizer prepends to a text (a BOS), from the text's ids without and with special tokens."""
    for at in range(len(with_special) - len(ids) + 1):
        if with_special[at : at + len(ids)] == ids:
            return with_special[:at]
    raise ValueError(f"expected the tokenizer to add special tokens around a text's ids {ids}, got {with_special}")


def _piece(match: re.Match[str], template: str) -> Piece:
    token, slot = match.group(), match.group("slot")
    if slot is None:
        if token in ("[", "]"):
            raise ValueError(
                f"the template {template!r:.300} has a stray {token!r} at character {match.start()}: slots are written "
                f"[name], with a name of letters, digits and _; write {token * 2} for a bracket"
            )
        return Text(token[0] if token in ("[[", "]]") else token)
    if slot == "Y":
        return Answer()
    if soft := _SOFT.fullmatch(slot):
        if soft.group(1).startswith("0"):
            raise ValueError(f"the template {template!r:.300} has {token}: soft tokens are numbered [P1], [P2], ...")
        return Soft(int(soft.group(1)))
    if slot in _RESERVED:
        raise ValueError(f"the template {template!r:.300} has a field called {slot}, a reserved name: use another one")
    return Field(slot)


def _with_space(text: str, space: bool) -> str:
    return f" {text}" if space and text and not text[0].isspace() else text


def check_no_soft_tokens(template: str, method: str) -> None:
    """Raise if a template is invalid or has soft tokens, for methods that don't place any."""
    if Template.parse(template).soft_tokens:
        raise ValueError(
            f"{method} expects a template without soft tokens, got {template!r:.300}: leave [P1]... out "
            "(PTuning is the method that places them)"
        )
