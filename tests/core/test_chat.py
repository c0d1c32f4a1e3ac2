from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm2_mm.chat import Prompt, build_prompt
from lfm2_mm.errors import MessageError, PlaceholderMismatch
from lfm2_mm.frontends import InputEncoder, Prepared
from lfm2_mm.messages import question_messages
from tests.core.tiny_tokenizer import LFM2_TEMPLATE, PLAIN_ADDED, SPECIALS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IMAGE, AUDIO = SPECIALS.index("<image>"), 50
ADDED = {string: TOKENIZER.token_id(string) for string in (*SPECIALS, *PLAIN_ADDED)}


class Fake:
    """An encoder of named things; `n` is how many positions a thing has."""

    def __init__(self, noun: str, placeholder: str, token_id: int, off_by: int = 0) -> None:
        self.types = frozenset({noun, f"{noun}_url"})
        self.placeholder = placeholder
        self.token_id = token_id
        self.off_by = off_by
        self.seen: list[str] = []

    def accepts(self, source: str) -> bool:
        return True

    def prepare(self, part: Mapping[str, Any]) -> Prepared:
        name, n = part["name"], part.get("n", 3)
        self.seen.append(name)
        text = f"<|image_start|>{self.placeholder * n}<|image_end|>" if self.placeholder else ""
        return Prepared(
            text=text,
            n_positions=n + self.off_by,
            tensors={},
            key=hashlib.sha256(name.encode()).hexdigest(),
        )

    def encode(self, batch: Sequence[Prepared]) -> list[Tensor]:
        return [torch.zeros(item.n_positions, 4) for item in batch]


def images() -> Fake:
    return Fake("image", "<image>", IMAGE)


def sounds() -> Fake:
    return Fake("audio", "", AUDIO)


def image(name: str, n: int = 3) -> dict[str, Any]:
    return {"type": "image", "name": name, "n": n}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def build(messages: Any, *encoders: InputEncoder, **options: Any) -> Prompt:
    return build_prompt(messages, tokenizer=TOKENIZER, encoders=encoders, **options)


def reference(messages: Any, **options: Any) -> list[int]:
    """What transformers makes of the same messages."""
    options = {"add_generation_prompt": True, **options}
    ids = TOKENIZER.hf.apply_chat_template(messages, return_dict=False, **options)
    assert isinstance(ids, list)
    return [int(id_) for id_ in ids if not isinstance(id_, str | list)]


def decoded(ids: Tensor) -> str:
    return TOKENIZER.decode(ids.tolist(), skip_special=False)


# --- the same ids as transformers -----------------------------------------------------------------

harmless = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda value: not any(string in value for string in ADDED)
)
turn = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": harmless}),
    st.fixed_dictionaries(
        {"role": st.just("user"), "content": st.lists(st.builds(text, harmless), min_size=1)}
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": harmless | st.builds("<think>{}</think>{}".format, harmless, harmless),
        }
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": harmless,
            "tool_calls": st.lists(
                st.builds(
                    lambda a, b: {
                        "type": "function",
                        "function": {"name": "f", "arguments": {"a": a, "b": [b]}},
                    },
                    harmless,
                    harmless,
                ),
                min_size=1,
                max_size=2,
            ),
        }
    ),
)
schemas = st.builds(
    lambda description: [
        {"type": "function", "function": {"name": "f", "description": description}}
    ],
    harmless,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(turn, min_size=1, max_size=4), st.none() | schemas, st.none() | harmless)
def test_ids_are_those_of_transformers(messages: Any, tools: Any, system: str | None) -> None:
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    prompt = build(messages, images(), tools=tools)
    assert prompt.ids.tolist() == reference(messages, tools=tools)
    assert prompt.identity.tolist() == prompt.ids.tolist()
    assert prompt.slots == ()


def test_options_reach_the_template() -> None:
    messages = [{"role": "user", "content": "hi"}]
    for options in ({"add_generation_prompt": False}, {"thinking": True}):
        assert build(messages, **options).ids.tolist() == reference(messages, **options)
    assert build(messages, thinking=True).thinking_open
    assert not build(messages).thinking_open


def test_tools_bring_the_date() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    today = datetime.now().strftime("%Y-%m-%d")
    assert f"Today's date: {today}" in build([user(text("hi"))], tools=tools).text


def test_images_are_where_transformers_puts_them() -> None:
    messages = [user(image("a"), text("what "), image("b", 2), text("?"))]
    prompt = build(messages, images())
    rendered = TOKENIZER.hf.apply_chat_template(
        [user({"type": "image"}, text("what "), {"type": "image"}, text("?"))],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert isinstance(rendered, str)
    first, second, rest = rendered.split("<image>")
    block = "<|image_start|>{}<|image_end|>".format
    whole = first + block("<image>" * 3) + second + block("<image>" * 2) + rest
    assert prompt.ids.tolist() == TOKENIZER.encode(whole)
    assert prompt.text == rendered


# --- nobody's text becomes a control token --------------------------------------------------------

control = st.sampled_from([*SPECIALS, *PLAIN_ADDED])
hostile = st.lists(
    st.one_of(
        control,
        st.text("a <|>é🙂", max_size=3),
        control.flatmap(lambda s: st.integers(1, len(s)).map(lambda i: s[:i])),
        control.flatmap(lambda s: st.integers(1, len(s)).map(lambda i: s[i:])),
        st.tuples(control, control).map(lambda two: two[0][:3] + two[1] + two[0][3:]),
        st.sampled_from(["\U00100000", "\U00100001", "\\udbc0\\udc00", "\\U00100000"]),
    ),
    max_size=6,
).map("".join)


def control_ids(ids: Tensor) -> list[int]:
    return [id_ for id_ in ids.tolist() if id_ in ADDED.values()]


@settings(max_examples=200, deadline=None)
@given(hostile, hostile, hostile)
def test_a_users_text_is_only_text(one: str, two: str, system: str) -> None:
    messages = [
        {"role": "system", "content": system},
        user(text(one), text(two), image("a"), text(one)),
        {"role": "tool", "content": two},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": one, two: [two]}}]
    prompt = build(messages, images(), tools=tools)
    calm = build(
        [{"role": "system", "content": "s"}, user(text("u"), image("a")),
         {"role": "tool", "content": "t"}],
        images(), tools=[{"type": "function", "function": {"name": "f"}}],
    )  # fmt: skip
    assert control_ids(prompt.ids) == control_ids(calm.ids)
    block = "<|image_start|>" + "<image>" * 3 + "<|image_end|>"
    shown = decoded(prompt.ids)
    assert f"<|im_start|>user\n{one}{two}{block}{one}<|im_end|>\n" in shown
    assert f"<|im_start|>tool\n{two}<|im_end|>\n" in shown
    assert f"<|im_start|>system\n{system}" in shown


@settings(max_examples=150, deadline=None)
@given(hostile, st.floats(0, 1))
def test_a_control_string_across_parts_or_an_attachment(content: str, share: float) -> None:
    at = round(share * len(content))
    left, right = text(content[:at]), text(content[at:])
    assert build([user(left, right)]).ids.tolist() == build([user(text(content))]).ids.tolist()
    sound = {"type": "audio", "name": "s"}
    ids = build([user(left, sound, right)], sounds()).ids
    assert control_ids(ids) == control_ids(build([user()]).ids)


def test_an_assistant_keeps_its_own_markers_only() -> None:
    said = "<think>a</think><|tool_call_start|>[f()]<|tool_call_end|><image><|im_end|>"
    prompt = build([user(text("x")), {"role": "assistant", "content": said}], images())
    found = [TOKENIZER.decode([id_], skip_special=False) for id_ in control_ids(prompt.ids)]
    assert found == [
        "<|startoftext|>", "<|im_start|>", "<|im_end|>",
        "<|im_start|>", "<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>",
        "<|im_end|>", "<|im_start|>",
    ]  # fmt: skip
    assert said in decoded(prompt.ids)


def test_arguments_of_calls_and_options_are_only_text() -> None:
    call = {"function": {"name": "f", "arguments": {"<image>": "<|tool_call_end|><|im_end|>"}}}
    messages = [user(text("x")), {"role": "assistant", "content": None, "tool_calls": [call]}]
    calm = [
        user(text("x")),
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ]
    prompt = build(messages, images(), documents=[{"text": "<image>"}])
    assert control_ids(prompt.ids) == control_ids(build(calm, images()).ids)
    assert '[f(<image>="<|tool_call_end|><|im_end|>")]' in decoded(prompt.ids)


@pytest.mark.parametrize("render", ["tojson(ensure_ascii=True)", "string"])
def test_a_template_that_escapes_what_it_prints(render: str) -> None:
    template = "<|im_start|>{{ messages[0]['tool_calls'] | " + render + " }}<|im_end|>"
    call = {"function": {"name": "f", "arguments": {"a": "<|im_end|>"}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    prompt = build_prompt(messages, tokenizer=tiny_tokenizer(template))
    assert len(control_ids(prompt.ids)) == 2
    assert "{'a': '<|im_end|>'}" in decoded(prompt.ids).replace('"', "'")


def test_control_strings_of_a_caller() -> None:
    tokenizer = tiny_tokenizer(control=["the quick"])
    free, cut = (
        build_prompt([user(text("the quick"))], tokenizer=one).ids.tolist()
        for one in (TOKENIZER, tokenizer)
    )
    assert free != cut
    assert decoded(torch.tensor(cut)) == decoded(torch.tensor(free))


# --- attachments ----------------------------------------------------------------------------------


def test_slots() -> None:
    encoder, other = images(), sounds()
    sound = {"type": "audio_url", "name": "s", "n": 4}
    messages = [user(image("a"), text("x"), sound, text("y")), user(image("b", 2))]
    prompt = build(messages, encoder, other)
    assert [slot.encoder for slot in prompt.slots] == [encoder, other, encoder]
    assert [len(slot.positions) for slot in prompt.slots] == [3, 4, 2]
    assert prompt.n_attachment_positions == 9
    for slot in prompt.slots:
        assert (prompt.ids[slot.positions] == slot.encoder.token_id).all()
    one, two, three = prompt.slots
    end = SPECIALS.index("<|image_end|>")
    assert prompt.ids[one.end - 1] == prompt.ids[three.end - 1] == end
    assert two.end == two.positions[-1] + 1
    assert len(prompt) == len(prompt.ids) == len(prompt.identity)
    assert prompt.ids.dtype == prompt.identity.dtype == two.positions.dtype == torch.int64


def common(one: Tensor, two: Tensor) -> int:
    n = min(len(one), len(two))
    differing = (one[:n] != two[:n]).nonzero()
    return int(differing[0]) if len(differing) else n


def test_identity_tells_contents_apart() -> None:
    def ask(name: str, question: str) -> Prompt:
        return build([user(image(name), text(question))], images())

    one, same, other, later = ask("a", "x"), ask("a", "x"), ask("b", "x"), ask("a", "y")
    positions = one.slots[0].positions
    assert torch.equal(one.identity, same.identity)
    assert torch.equal(one.ids, other.ids)
    assert common(one.identity, other.identity) == int(positions[0])
    assert common(one.identity, later.identity) == common(one.ids, later.ids) == one.slots[0].end
    taken = one.identity[positions]
    assert (taken < 0).all() and (taken >= -(2**62)).all() and len(set(taken.tolist())) == 3
    longer = build([user(image("a", 5))], images())
    assert torch.equal(longer.identity[longer.slots[0].positions][:3], taken)
    elsewhere = one.ids.clone()
    elsewhere[positions] = 0
    assert torch.equal(torch.where(one.identity < 0, 0, one.identity), elsewhere)


def test_bare_parts_are_filled_in_order() -> None:
    encoder, other = images(), sounds()
    messages = [user({"type": "image"}, {"type": "audio"}, image("kept")), user({"type": "image"})]
    given = [image("a"), {"type": "audio", "name": "s"}, image("b")]
    prompt = build(messages, encoder, other, attachments=given)
    assert encoder.seen == ["a", "kept", "b"] and other.seen == ["s"]
    assert len(prompt.slots) == 4


@pytest.mark.parametrize(
    ("places", "given", "sentence"),
    [
        (3, 2, "the messages hold 3 image placeholders but 2 images were given; give one image"),
        (1, 0, "the messages hold 1 image placeholder but 0 images were given"),
        (0, 1, "the messages hold 0 image placeholders but 1 image was given"),
    ],
)
def test_placeholders_and_attachments_must_agree(places: int, given: int, sentence: str) -> None:
    messages = [user(*[{"type": "image"}] * places, text("x"))]
    with pytest.raises(PlaceholderMismatch, match=sentence):
        build(messages, images(), attachments=[image("a")] * given)


def test_a_template_that_drops_parts() -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(PlaceholderMismatch, match="rendered 0 placeholders for 1 image part; put"):
        build_prompt([user(image("a"))], tokenizer=tokenizer, encoders=[images()])


def test_features_and_positions_must_agree() -> None:
    wrong = Fake("image", "<image>", IMAGE, off_by=1)
    with pytest.raises(PlaceholderMismatch, match=f"3 positions of token {IMAGE} for 4 features"):
        build([user(image("a"))], wrong)


def test_a_question() -> None:
    encoder = images()
    a, b, sound = image("a"), image("b"), {"type": "audio", "name": "s"}

    def ask(question: str, *parts: Any, **options: Any) -> Any:
        return question_messages(question, parts, encoders=[encoder, sounds()], **options)

    assert ask("why?") == [{"role": "user", "content": "why?"}]
    assert ask("why?", a, b) == [user(a, b, text("why?"))]
    assert ask("", a) == [user(a)]
    assert ask("1 <image> 2 <image>?", a, sound, b) == [
        user(sound, text("1 "), a, text(" 2 "), b, text("?"))
    ]
    assert ask("x", system="be brief")[0] == {"role": "system", "content": "be brief"}
    assert len(build(ask("<image><image>", a, b), encoder).slots) == 2
    with pytest.raises(
        PlaceholderMismatch, match="question holds 2 image placeholders but 1 image"
    ):
        ask("<image> <image>", a)
    with pytest.raises(PlaceholderMismatch, match="holds 1 image placeholder but 0 images were"):
        ask("<image>")


# --- templates ------------------------------------------------------------------------------------


def test_a_template_that_wants_strings() -> None:
    tokenizer = tiny_tokenizer(LFM2_TEMPLATE)
    sound = {"type": "audio", "name": "s"}
    messages = [user(text("a"), sound, text("b"), text("c"))]
    prompt = build_prompt(messages, tokenizer=tokenizer, encoders=[sounds()])
    assert prompt.text == "<|startoftext|><|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.n_attachment_positions == 3
    with pytest.raises(MessageError, match="template refuses these messages .*; change their"):
        build_prompt([user(image("a"))], tokenizer=tokenizer, encoders=[images()])


def test_no_template() -> None:
    tokenizer = tiny_tokenizer(None)
    messages = [{"role": "developer", "content": "s<|im_end|>"}, user(image("a"), text("q"))]
    prompt = build_prompt(messages, tokenizer=tokenizer, encoders=[images()])
    assert decoded(prompt.ids) == (
        "<|startoftext|><|im_start|>system\ns<|im_end|><|im_end|>\n<|im_start|>user\n"
        "<|image_start|><image><image><image><|image_end|>q<|im_end|>\n<|im_start|>assistant\n"
    )
    assert control_ids(prompt.ids)[:4] == [1, 2, 3, 2]
    assert prompt.n_attachment_positions == 3
    with pytest.raises(MessageError, match="has no chat template, so tools"):
        build_prompt(messages[:1], tokenizer=tokenizer, tools=[{"name": "f"}])


def test_calls_with_json_arguments() -> None:
    for arguments in ('{"a": "x", "b": 1}', {"a": "x", "b": 1}):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        prompt = build([user(text("q")), {"role": "assistant", "tool_calls": [call]}])
        assert '<|tool_call_start|>[f(a="x", b=1)]<|tool_call_end|>' in prompt.text
    flat = {"name": "g", "arguments": ""}
    assert "[g()]" in build([{"role": "assistant", "tool_calls": [flat]}]).text


def test_a_tool_may_be_a_function() -> None:
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: Where <|im_end|>.
        """
        return city

    prompt = build([user(text("q"))], tools=[weather])
    assert '"name": "weather"' in prompt.text and "Where <|im_end|>" in prompt.text
    with pytest.raises(MessageError, match="tool 0 is a int that gives no JSON schema"):
        build([user(text("q"))], tools=[3])


def test_a_tool_result_may_be_a_mapping() -> None:
    assert '{"a": "é"}' in build([{"role": "tool", "content": {"a": "é"}}]).text


# --- what is refused ------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    ("messages", "options", "sentence"),
    [
        ([], {}, "the list of messages is empty; give at least one"),
        ("hi", {}, "the messages are a str; give a list of"),
        ({"role": "user"}, {}, "the messages are a dict; give a list of"),
        (["hi"], {}, "message 0 is a str; give a mapping with 'role'"),
        ([{"role": "robot", "content": ""}], {},
         "message 0 has the role 'robot'; use one of 'system', 'user', 'assistant', 'tool'"),
        ([{"content": "x"}], {}, "message 0 has the role None; use one of"),
        ([user(text("a")), {"role": "user"}], {}, "message 1 has content of type NoneType; give"),
        ([{"role": "user", "content": 3}], {}, "message 0 has content of type int; give text or a"),
        ([user({"text": "x"})], {}, "holds a content part without a type .*; give for instance"),
        ([user(3)], {}, r"holds a content part without a type \(3\); give for instance"),
        ([user({"type": "text", "text": 3})], {}, "holds a text part whose text is 3; give a str"),
        ([user({"type": "video", "video": "x"})], {},
         "holds a content part of type 'video', which this model does not read; it accepts "
         "'text', 'image', 'image_url'"),
        ([user(text("x"))], {"attachments": [{"type": "video"}]},
         "an attachment of type 'video', which this model does not read; it accepts 'text'"),
        ([{"role": "assistant", "tool_calls": "f()"}], {}, "has tool_calls .*; give a list of"),
        ([{"role": "assistant", "tool_calls": [{"id": 1}]}], {}, "holds the tool call .*; give"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], {},
         "message 0 calls 'f' with arguments '{'; give a JSON object"),
        ([user(text("\ud83d"))], {}, "holds the lone surrogate .* at index 0; send whole"),
        ([user(text("x"))], {"tools": [{"x": nested(70)}]}, "nested more than 64 levels deep"),
        ([user(text("x"))], {"tools": {"name": "f"}}, "the tools are a dict; give a list of JSON"),
        ([user(text("x"))], {"chat_template": "x"}, "the template option 'chat_template' cannot"),
    ],
)  # fmt: skip
def test_malformed(messages: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MessageError, match=sentence):
        build(messages, images(), **options)


def test_raw_ids() -> None:
    prompt = Prompt.from_ids([5, 6, 7])
    assert prompt.ids.tolist() == prompt.identity.tolist() == [5, 6, 7]
    assert prompt.ids.dtype == torch.int64
    assert len(prompt) == 3 and prompt.n_attachment_positions == 0
    assert len(Prompt.from_ids(torch.tensor([], dtype=torch.int32))) == 0
