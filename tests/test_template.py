"""Templates: parsing, and how an example becomes token ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from softkv.methods.template import Answer, Field, Soft, Template, Text

BOS, EOS = "<s>", "</s>"


def byte_tokenizer(special: str = "$A") -> PreTrainedTokenizerFast:
    """One token a byte, so that every space shows; `special` says what the tokenizer adds around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(single=special, special_tokens=[(BOS, 0), (EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def spacing_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Each text that is tokenised gets a space (shown as ▁) in front, as in SentencePiece vocabularies: always, as
    Llama 2's does ("prepend"), or where it has none ("metaspace")."""
    vocabulary = {token: number for number, token in enumerate([BOS, EOS, "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0), (EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token="<unk>")


PLAIN = byte_tokenizer()


def shown(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Ids as a text, soft tokens as <1>, <2>..."""
    tokens = [f"<{-number}>" if number < 0 else tokenizer.convert_ids_to_tokens(number) for number in ids]
    return "".join(tokens).replace("Ġ", " ").replace("Ċ", "\n")


def encoded(template: str, tokenizer: PreTrainedTokenizerFast = PLAIN, **given: str) -> str:
    return shown(tokenizer, Template.parse(template).encode(tokenizer, **given)["input_ids"])


# Parsing --------------------------------------------------------------------------------------------------------------


def test_pieces_of_a_template() -> None:
    template = Template.parse("[X] is [P1] and [P2] [Y]")
    expected = (Field("X"), Text(" is "), Soft(1), Text(" and "), Soft(2), Text(" "), Answer())
    assert template.pieces == expected
    assert template.fields == ("X",)
    assert template.soft_tokens == 2


def test_several_fields_and_one_used_twice() -> None:
    template = Template.parse("[premise] [P2][P1] [hypothesis]? [premise] [Y]")
    assert template.fields == ("premise", "hypothesis")
    assert template.soft_tokens == 2


def test_brackets_are_written_twice() -> None:
    assert Template.parse("[[INST]] [X][[[Y]").pieces == (Text("[INST] "), Field("X"), Text("["), Answer())
    assert encoded("[[a]] [X] [Y]", X="b", answer="c") == "[a] b c"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("[X] is", "has no answer: write \\[Y\\]"),
        ("", "has no answer"),
        ("[Y] [X]", "' \\[X\\]' follows \\[Y\\]"),
        ("[X] [Y].", "'.' follows \\[Y\\]"),
        ("[X] [Y] ", "' ' follows \\[Y\\]"),
        ("[X] [Y] [Y]", "has 2 answers"),
        ("[X] [P1] [P3] [Y]", "\\[P1\\] \\[P3\\], expected each of \\[P1\\] to \\[P2\\] once"),
        ("[X] [P2] [Y]", "\\[P2\\], expected each of \\[P1\\] to \\[P1\\] once"),
        ("[P1] [X] [P1] [Y]", "\\[P1\\] \\[P1\\], expected each"),
        ("[P0] [X] [Y]", "numbered \\[P1\\]"),
        ("[P01] [X] [Y]", "numbered \\[P1\\]"),
        ("[X] [the question] [Y]", "stray '\\[' at character 4"),
        ("X] [Y]", "stray '\\]' at character 1"),
        ("[] [Y]", "stray '\\['"),
        ("[answer] [Y]", "reserved name"),
        ("[tokenizer] [Y]", "reserved name"),
    ],
)
def test_wrong_templates_say_what_is_wrong(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template.parse(template)


@st.composite
def templates(draw: st.DrawFn) -> Template:
    name = st.from_regex(r"[A-Za-z_]\w{0,5}", fullmatch=True).filter(
        lambda name: name not in ("Y", "answer", "tokenizer", "self") and not (name[0] == "P" and name[1:].isdecimal())
    )
    text = st.text(st.sampled_from("ab[] \n.é"), min_size=1, max_size=6).map(Text)
    pieces = draw(st.lists(text | name.map(Field) | st.just(Soft(0)), max_size=8))
    numbers = iter(draw(st.permutations(range(1, 1 + sum(isinstance(piece, Soft) for piece in pieces)))))
    merged: list[Text | Field | Soft | Answer] = []
    for piece in pieces:
        if isinstance(piece, Text) and merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + piece.text)
        else:
            merged.append(Soft(next(numbers)) if isinstance(piece, Soft) else piece)
    return Template((*merged, Answer()))


@given(templates())
def test_a_template_survives_being_written(template: Template) -> None:
    assert Template.parse(str(template)) == template


@given(st.text(st.sampled_from("[]XYP12 a"), max_size=16))
def test_any_text_is_a_template_or_a_clear_error(text: str) -> None:
    try:
        template = Template.parse(text)
    except ValueError as error:
        assert repr(text) in str(error)  # noqa: PT017
    else:
        assert str(template).replace("[", "").replace("]", "") == text.replace("[", "").replace("]", "")
        assert Template.parse(str(template)) == template


@given(templates(), st.text(st.sampled_from("xy z"), max_size=4), st.text("pq", min_size=1, max_size=3))
def test_rows_of_any_template(template: Template, value: str, answer: str) -> None:
    fields = dict.fromkeys(template.fields, value)
    row = template.encode(PLAIN, answer=answer, **fields)
    prompt = template.encode(PLAIN, **fields)
    soft = [-number for number in row["input_ids"] if number < 0]
    assert soft == [piece.number for piece in template.pieces if isinstance(piece, Soft)]
    assert len(row["labels"]) == len(row["input_ids"])
    assert set(prompt["labels"]) <= {-100}
    # The prompt of an answered row is the prompt alone: what generation sees is what training saw.
    length = len(prompt["input_ids"])
    assert row["input_ids"][:length] == prompt["input_ids"]
    assert row["labels"] == [-100] * length + row["input_ids"][length:]


# Encoding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row", "why"),
    [
        ("[X] [Y]", "good bad", "the space before [Y] goes with the answer"),
        ("[X][Y]", "goodbad", "no space is made up"),
        ("[X] is [P1] and [P2] [Y]", "good is<1>and<2> bad", "white space next to a soft token is dropped"),
        ("[P1] [X] [Y]", "<1> good bad", "a field keeps one leading space, after a soft token too"),
        ("[P1]  \n [X][P2][Y]", "<1> good<2>bad", "but only one"),
        ("[P1]\n[X] [Y]", "<1>good bad", "and a line break is no space"),
        ("Review:\n[X]\nIt is:  [Y]", "Review:\ngood\nIt is:  bad", "other white space stays"),
        ("[P2][P1] [P3] [Y]", "<2><1><3> bad", "soft tokens in any order, next to each other"),
        (" [X] [Y]", " good bad", "a row may begin with a space"),
        ("It is [Y]", "It is bad", "no field"),
        ("[X] [X] [Y]", "good good bad", "a field twice"),
    ],
)
def test_white_space(template: str, row: str, why: str) -> None:
    fields = dict.fromkeys(Template.parse(template).fields, "good")
    assert encoded(template, answer="bad", **fields) == row, why


def test_a_text_that_brings_its_space_gets_no_second_one() -> None:
    assert encoded("[X] [Y]", X="good", answer=" bad") == "good bad"
    assert encoded("a [X] [Y]", X="\tgood", answer="bad").endswith("good bad")


def test_an_empty_field_leaves_no_space() -> None:
    assert encoded("a [X] [Y]", X="", answer="bad") == "a bad"


def test_pieces_are_tokenised_apart() -> None:
    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging)
    row = Template.parse("[X]b[Y]").encode(tokenizer, X="a", answer="ab")
    assert row == {"input_ids": [0, 1, 2], "labels": [-100, -100, 2]}


@pytest.mark.parametrize(
    ("special", "start"), [("$A", ""), (f"{BOS} $A", BOS), (f"{BOS} $A {EOS}", BOS), (f"$A {EOS}", "")]
)
def test_bos_once_and_no_eos(special: str, start: str) -> None:
    tokenizer = byte_tokenizer(special)
    assert encoded("[X] is [P1] [Y]", tokenizer, X="a", answer="b") == f"{start}a is<1> b"
    assert encoded("[P1] [X] [Y]", tokenizer, X="a") == f"{start}<1> a"


def test_labels_begin_with_the_answer() -> None:
    row = Template.parse("[X] [P1] [Y]").encode(byte_tokenizer(f"{BOS} $A"), X="ab", answer="c")
    assert row["input_ids"][:1] == [0]
    assert row["labels"] == [-100] * 4 + row["input_ids"][4:]
    assert shown(PLAIN, row["labels"][4:]) == " c"


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_a_tokenizer_that_puts_a_space_in_front_gets_no_second_one(kind: str) -> None:
    tokenizer = spacing_tokenizer(kind)
    assert encoded("[X] is [P1] [Y]", tokenizer, X="ab", answer="c") == f"{BOS}▁ab▁is<1>▁c"
    assert encoded("[X] is [P1] [Y]", tokenizer, X="a b", answer=" c") == f"{BOS}▁a▁b▁is<1>▁c"


def test_wrong_fields_say_what_is_wrong() -> None:
    template = Template.parse("[premise] [hypothesis] [Y]")
    with pytest.raises(ValueError, match=r"no field X \(it has premise, hypothesis\)"):
        template.encode(PLAIN, premise="a", hypothesis="b", X="c")
    with pytest.raises(ValueError, match="needs a text for hypothesis"):
        template.encode(PLAIN, premise="a")
    with pytest.raises(ValueError, match="given as answer="):
        template.encode(PLAIN, premise="a", hypothesis="b", Y="c")
    with pytest.raises(ValueError, match="premise expects a text, got int"):
        template.encode(PLAIN, premise=1, hypothesis="b")
    with pytest.raises(ValueError, match="holds no token"):
        template.encode(PLAIN, premise="a", hypothesis="b", answer="")
