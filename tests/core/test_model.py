"""The public verbs on text models: ask, chat, logits, save; what a caller sees of a request."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lfm2_mm
from lfm2_mm.chat import Prompt
from lfm2_mm.errors import InputError, MessageError
from lfm2_mm.model import Answer, Model, Reply, Stream
from lfm2_mm.sampling import Sampling
from tests import oracle
from tests.oracle import endless, ours

LETTERS: dict[str, Any] = {"regex": "[a-z]{40}", "sampling": Sampling(temperature=1.0, seed=3)}
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
def model() -> Model:
    return endless(ours("dense"))


# --- answers


def test_an_answer_is_its_text_and_knows_what_it_took(model: Model) -> None:
    answer = model.ask("hello", max_tokens=12, **LETTERS)
    assert isinstance(answer, str)
    assert isinstance(answer, Answer)
    assert len(answer) == 12
    assert answer.done.finish_reason == "length"
    assert answer.done.usage.completion_tokens == 12
    assert answer.parsed.text == answer
    assert answer.done.timings.first_token >= answer.done.timings.prepare > 0


def test_streamed_equals_whole(model: Model) -> None:
    whole = model.ask("hello", max_tokens=12, **LETTERS)
    stream = model.ask("hello", max_tokens=12, stream=True, **LETTERS)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == whole == stream.answer
    assert stream.prompt.ids.tolist() == model.prompt(USER).ids.tolist()
    assert list(stream) == []


def test_the_prompt_is_what_transformers_renders(model: Model) -> None:
    messages = [{"role": "system", "content": "be brief"}, *USER]
    wanted: Any = oracle.hf_tokenizer().apply_chat_template(messages, add_generation_prompt=True)
    assert model.prompt(messages).ids.tolist() == wanted["input_ids"]
    stream = model.ask("hello", system="be brief", stream=True)
    assert stream.prompt.ids.tolist() == wanted["input_ids"]
    without = model.prompt(messages, add_generation_prompt=False).ids.tolist()
    assert without == wanted["input_ids"][: len(without)]
    assert len(without) < len(wanted["input_ids"])


def test_cancelling_a_stream_keeps_what_came(model: Model) -> None:
    stream = model.ask("hello", max_tokens=40, stream=True, **LETTERS)
    first = next(stream)
    stream.cancel()
    answer = stream.answer
    assert answer.done.finish_reason == "cancelled"
    assert answer.startswith(first)
    assert len(answer) < 40


def test_closing_or_dropping_a_stream_cancels(model: Model) -> None:
    with contextlib.closing(model.ask("hello", stream=True)) as stream:
        pass
    assert stream.answer.done.finish_reason == "cancelled"
    unread = model.ask("hello", stream=True)
    handle = unread._handle
    del unread
    assert handle.done is not None
    assert handle.done.finish_reason == "cancelled"
    assert not model.engine.step()


def test_a_failure_reaches_the_reader_every_time(model: Model) -> None:
    stream = model.ask("hello", stream=True)

    def fail(*args: object) -> None:
        raise RuntimeError("broken layer")

    hook = model.backbone.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        next(stream)
    with pytest.raises(RuntimeError, match="broken layer"):
        stream.answer  # noqa: B018 - a property that runs
    hook.remove()


def test_the_checkpoints_own_sampling_counts(tmp_path: Path) -> None:
    ours("dense").save(tmp_path / "m")
    settings = {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "eos_token_id": [7, 30]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(settings))
    model = lfm2_mm.load(tmp_path / "m", threads=1)
    assert (model.sampling.temperature, model.sampling.min_p) == (0.3, 0.15)
    assert model.head.eos_ids == {7, 30}


# --- chat


def test_chat_replies_with_a_message(model: Model) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    strict = {
        "type": "json_schema",
        "json_schema": {"schema": schema | {"additionalProperties": False}},
    }
    reply = model.chat(USER, response_format=strict, sampling=Sampling(temperature=1, seed=1))
    assert isinstance(reply, Reply)
    assert json.loads(reply.text)["n"] in (1, 2)
    assert reply.to_message() == {"role": "assistant", "content": reply.text}
    assert (reply.thinking, reply.tool_calls) == (None, ())
    again = model.chat([*USER, reply.to_message(), *USER], max_tokens=3)
    assert isinstance(again, Reply)
    assert again.done.usage.cached_tokens > len(model.prompt(USER))


def test_tool_calls_come_back_parsed(model: Model) -> None:
    said = '<|tool_call_start|>[look(where="up")]<|tool_call_end|><|im_end|>'
    tokens = iter(model.tokenizer.encode(said))
    model.head.logits = lambda hidden: torch.eye(512)[[next(tokens)]]  # type: ignore[method-assign]
    model.head.eos_ids = frozenset({oracle.EOS_ID})
    reply = model.chat(USER, tools=[{"type": "function", "function": {"name": "look"}}])
    assert isinstance(reply, Reply)
    (call,) = reply.tool_calls
    assert (call["function"]["name"], call["function"]["arguments"]) == ("look", '{"where": "up"}')
    assert reply.text == ""
    message = reply.to_message()
    assert message["tool_calls"] == [call]
    follow = [*USER, message, {"role": "tool", "content": "sky"}]
    assert 'look(where="up")' in model.prompt(follow).text


def test_chat_streams(model: Model) -> None:
    stream = model.chat(USER, stream=True, max_tokens=5, regex="[a-z]{9}")
    assert isinstance(stream, Stream)
    assert len("".join(stream)) == 5


def test_a_picture_needs_an_encoder(model: Model) -> None:
    with pytest.raises(MessageError, match="'image', which this model does not read"):
        model.ask("what is it?", images=["a.png"])


@pytest.mark.parametrize(
    ("options", "says"),
    [({"stop": [""]}, "a stop string is empty"), ({"max_tokens": -1}, "max_tokens is -1")],
)
def test_unusable_options(model: Model, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        model.ask("hello", **options)
    assert not model.engine.step()


def test_one_stop_string_may_be_plain(model: Model) -> None:
    whole = model.ask("hello", max_tokens=20, **LETTERS)
    stop = whole[4:6]
    assert model.ask("hello", max_tokens=20, stop=stop, **LETTERS) == whole.split(stop)[0]


# --- logits


def test_logits_take_messages_ids_or_a_tensor(model: Model) -> None:
    prompt = model.prompt(USER)
    of_messages = model.logits(USER)
    assert of_messages.shape == (len(prompt), 512)
    assert torch.equal(of_messages, model.logits(prompt.ids))
    assert torch.equal(of_messages, model.logits(prompt.ids.tolist()))
    shorter = model.logits(USER, add_generation_prompt=False)
    assert len(shorter) < len(of_messages)
    torch.testing.assert_close(of_messages, oracle.their_logits("dense", prompt), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="the prompt is empty"):
        model.logits(torch.tensor([], dtype=torch.int64))
    with pytest.raises(MessageError, match="list of messages is empty"):
        model.logits([])


# --- saving


def opened(folder: Path) -> Any:
    """The checkpoint in transformers, which must miss nothing and find nothing unknown."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    net, info = loaded
    assert not any(info.values()), info
    return net.eval()


@pytest.mark.parametrize("name", oracle.TEXT_VARIANTS)
def test_what_is_saved_loads_in_transformers_and_here(name: str, tmp_path: Path) -> None:
    model = ours(name)
    model.save(tmp_path / "saved")
    prompt = Prompt.from_ids(oracle.ids(19, seed=4))
    wanted = oracle.their_logits(name, prompt)
    again = opened(tmp_path / "saved")
    with torch.no_grad():
        theirs = again(prompt.ids[None]).logits[0]
    assert torch.equal(theirs, wanted)
    reloaded = lfm2_mm.load(tmp_path / "saved", threads=1)
    assert torch.equal(reloaded.logits(prompt.ids), model.logits(prompt.ids))
    assert reloaded.prompt(USER).ids.tolist() == model.prompt(USER).ids.tolist()
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is (not again.config.tie_word_embeddings)


def test_saving_in_bf16_says_so(tmp_path: Path) -> None:
    ours("moe", dtype="bfloat16").save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert kinds.pop("model.layers.2.feed_forward.expert_bias") == "F32"
    assert {kind for name, kind in kinds.items() if "expert_bias" not in name} == {"BF16"}


def test_a_head_that_should_be_tied_but_is_not_is_saved_as_it_is(tmp_path: Path) -> None:
    model = ours("untied")
    model.config = {**model.config, "tie_word_embeddings": True, "tie_embedding": True}
    model.save(tmp_path / "saved")
    ids = oracle.ids(9)
    again = opened(tmp_path / "saved")
    with torch.no_grad():
        found = again(ids[None]).logits[0]
    assert torch.equal(found, oracle.their_logits("untied", Prompt.from_ids(ids)))
