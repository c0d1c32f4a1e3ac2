"""A loaded model and its verbs: `ask`, `chat`, `logits`, `save`.

Puts the parts together for callers: messages become a prompt, the engine runs it, raw output
becomes text, thinking and tool calls. Encoders are attached by content type; several may be. The
command line, the server and user code all come in here; nothing here runs a step itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.chat import Prompt, build_prompt
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.constrain import Constraint, from_response_format
from lfm2_mm.engine import Engine
from lfm2_mm.errors import Lfm2Error
from lfm2_mm.events import Done, Error, TextDelta
from lfm2_mm.frontends import InputEncoder
from lfm2_mm.heads import TextHead
from lfm2_mm.messages import Messages, question_messages
from lfm2_mm.request import Handle, Request
from lfm2_mm.sampling import Sampling
from lfm2_mm.saving import save_checkpoint
from lfm2_mm.tokenizer import Tokenizer
from lfm2_mm.toolcalls import Parsed, parse_output

if TYPE_CHECKING:
    from lfm2_mm.backbone import Backbone
    from lfm2_mm.quantize.layers import Packed

__all__ = ["Answer", "Model", "Reply", "Stream"]

Attachment = Any
"""A path, URL, bytes or an object that the modality's encoder reads (a PIL image, say)."""


class Answer(str):
    """The text of an answer, with what it took to get it.

    Attributes:
        done: Finish reason, token counts and times.
        parsed: The same output split into text, thinking and tool calls.
    """

    __slots__ = ("done", "parsed")

    done: Done
    parsed: Parsed

    def __new__(cls, parsed: Parsed, done: Done) -> Answer:
        """An answer is its text."""
        made = super().__new__(cls, parsed.text)
        made.parsed, made.done = parsed, done
        return made


@dataclass(frozen=True)
class Reply:
    """One assistant turn.

    Attributes:
        text: The answer without thinking and tool calls.
        thinking: What stood in the think block, or None.
        tool_calls: Calls the model asks for, in OpenAI form.
        done: Finish reason, token counts and times.
    """

    text: str
    thinking: str | None
    tool_calls: tuple[dict[str, Any], ...]
    done: Done

    def to_message(self) -> dict[str, Any]:
        """The turn as a message, to be appended to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


class Stream(Iterator[str]):
    """Pieces of an answer as they come; afterwards `.answer` holds all of it.

    Closing it or dropping it before the end cancels the request.
    """

    def __init__(self, handle: Handle, parse: Parser) -> None:
        self._handle, self._parse = handle, parse
        self._pieces: list[str] = []
        self._events = iter(handle)
        self._error: Exception | None = None

    def __next__(self) -> str:
        for event in self._events:
            if isinstance(event, TextDelta):
                self._pieces.append(event.text)
                return event.text
            if isinstance(event, Error):
                self._error = event.exception
                raise event.exception
        raise StopIteration

    def __del__(self) -> None:
        self._handle.cancel()

    @property
    def prompt(self) -> Prompt:
        """What the model was given."""
        return self._handle.prompt

    @property
    def answer(self) -> Answer:
        """The whole answer; runs to the end if need be.

        Raises:
            Exception: whatever made the request fail.
        """
        for _ in self:
            pass
        if self._handle.done is None:
            raise self._error or Lfm2Error("the answer was broken off; ask again")
        return Answer(self._parse("".join(self._pieces)), self._handle.done)

    def cancel(self) -> None:
        """Stop generating; the pieces so far stay, and `answer` says "cancelled"."""
        self._handle.cancel()

    def close(self) -> None:
        """The same as `cancel`; for `contextlib.closing`."""
        self.cancel()


@dataclass(frozen=True)
class Parser:
    """Raw output to text, thinking and calls, as the prompt was left open."""

    thinking_open: bool = False

    def __call__(self, raw: str) -> Parsed:
        """Split one assistant turn."""
        return parse_output(raw, thinking_open=self.thinking_open)


@dataclass
class Model:
    """A backbone with its tokenizer, text head, encoders and engine.

    Attributes:
        name: What the user calls it.
        backbone: Embeddings in, hidden states out.
        head: Hidden states to text.
        tokenizer: Text to ids and back.
        engine: Runs requests.
        encoders: Input encoders by content type.
        sampling: How tokens are chosen where a call says nothing.
        config: The checkpoint's `config.json`.
        folder: Where the checkpoint lies.
        parts: Further modules whose weights belong to the checkpoint, for saving: stored prefix to
            module.
    """

    name: str
    backbone: Backbone
    head: TextHead
    tokenizer: Tokenizer
    engine: Engine
    config: Mapping[str, Any]
    folder: Path
    sampling: Sampling = field(default_factory=Sampling)
    encoders: dict[str, InputEncoder] = field(default_factory=dict)
    parts: dict[str, torch.nn.Module] = field(default_factory=dict)

    @classmethod
    def assemble(
        cls,
        checkpoint: Checkpoint,
        backbone: Backbone,
        head: Tensor | Packed,
        tokenizer: Tokenizer,
    ) -> Model:
        """Put the parts of a checkpoint together."""
        from lfm2_mm.loading import text_head

        text = text_head(backbone, head, checkpoint)
        return cls(
            name=checkpoint.name,
            backbone=backbone,
            head=text,
            tokenizer=tokenizer,
            engine=Engine(backbone, text, tokenizer),
            config=checkpoint.config,
            folder=checkpoint.folder,
            sampling=Sampling.from_generation_config(
                checkpoint.json("generation_config.json") or {}
            ),
        )

    def attach(self, encoder: InputEncoder) -> None:
        """Add an input encoder; it takes over the content types it claims."""
        for kind in encoder.types:
            self.encoders[kind] = encoder

    @property
    def _encoders(self) -> tuple[InputEncoder, ...]:
        return tuple({id(encoder): encoder for encoder in self.encoders.values()}.values())

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the computation."""
        return self.backbone.embed_tokens.weight.dtype

    @overload
    def ask(
        self,
        question: str,
        images: Sequence[Attachment] | Attachment = ...,
        *,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> Answer: ...

    @overload
    def ask(
        self,
        question: str,
        images: Sequence[Attachment] | Attachment = ...,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> Stream: ...

    def ask(
        self,
        question: str,
        images: Sequence[Attachment] | Attachment = (),
        *,
        stream: bool = False,
        system: str | None = None,
        **options: Any,
    ) -> Answer | Stream:
        """Ask one question, about images or about nothing.

        Args:
            question: The text. `<image>` in it places the images; else they come first.
            images: Paths, URLs, bytes or PIL images.
            stream: Return an iterator of text pieces instead of the whole answer.
            system: A system message.
            **options: As for `generate`.

        Raises:
            InputError: if an image or the question cannot be used.
        """
        if isinstance(images, str | bytes | Path) or not isinstance(images, Sequence):
            images = [images]
        began = time.perf_counter()
        parts = [{"type": "image", "image": image} for image in images]
        messages = question_messages(question, parts, encoders=self._encoders, system=system)
        running = self.generate(self.prompt(messages), began=began, **options)
        return running if stream else running.answer

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Reply | Stream:
        """Continue a conversation.

        Args:
            messages: In OpenAI form; content parts of types the attached encoders claim.
            tools: JSON schemas in OpenAI form, or documented functions.
            response_format: In OpenAI form: `json_object`, `json_schema` or `text`.
            stream: Return an iterator of raw text pieces; its `.answer.parsed` has the rest.
            **options: As for `generate`.
        """
        began = time.perf_counter()
        constraint = from_response_format(response_format)
        if constraint is not None:
            options["constraint"] = constraint
        prompt = self.prompt(messages, tools=tools)
        running = self.generate(prompt, began=began, **options)
        if stream:
            return running
        answer = running.answer
        calls = tuple(call.to_openai() for call in answer.parsed.tool_calls)
        return Reply(str(answer), answer.parsed.thinking, calls, answer.done)

    def prompt(
        self,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        images: Sequence[Attachment] = (),
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt of a conversation; `images` fill bare `{"type": "image"}` parts in order."""
        return build_prompt(
            messages,
            tokenizer=self.tokenizer,
            encoders=self._encoders,
            tools=tools,
            attachments=[{"type": "image", "image": image} for image in images],
            add_generation_prompt=add_generation_prompt,
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        reuse: bool = True,
        began: float | None = None,
    ) -> Stream:
        """Run a prompt.

        Args:
            prompt: From `prompt`, or `Prompt.from_ids`.
            max_tokens: Tokens to generate at most.
            sampling: How tokens are chosen; None takes the checkpoint's own way.
            stop: Strings that end the answer.
            constraint: What the answer must follow.
            json_schema: Short for `Constraint.json_schema(…)`.
            regex: Short for `Constraint.regex(…)`.
            reuse: Whether prefixes computed earlier may be used.
            began: `time.perf_counter()` at which the caller started.
        """
        if json_schema is not None:
            constraint = Constraint.json_schema(json_schema)
        elif regex is not None:
            constraint = Constraint.regex(regex)
        request = Request(
            prompt=prompt,
            sampling=sampling if sampling is not None else self.sampling,
            max_tokens=max_tokens,
            stop=tuple([stop] if isinstance(stop, str) else stop),
            constraint=constraint,
            reuse=reuse,
            began=time.perf_counter() if began is None else began,
        )
        return Stream(self.engine.submit(request), Parser(prompt.thinking_open))

    def logits(
        self,
        messages_or_ids: Messages | Sequence[int] | Tensor,
        images: Sequence[Attachment] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Float[Tensor, "n v"]:
        """Raw scores after every position, fp32: for evaluations and parity.

        Args:
            messages_or_ids: A conversation, or raw token ids.
            images: Fill bare `{"type": "image"}` parts in order.
            add_generation_prompt: Whether the prompt ends where the assistant begins.
        """
        raw: Any = messages_or_ids
        if isinstance(raw, Tensor) or (len(raw) > 0 and all(isinstance(i, int) for i in raw)):
            return self.engine.logits(Prompt.from_ids(raw))
        return self.engine.logits(
            self.prompt(raw, images=images, add_generation_prompt=add_generation_prompt)
        )

    def save(self, folder: str | Path) -> None:
        """Write the model in the official layout; `load` and `transformers` read it.

        Raises:
            InputError: if the folder holds something else.
        """
        prefix = "model.language_model." if self.parts else "model."
        state = {prefix + name: value for name, value in self.backbone.state_dict().items()}
        for stored, module in self.parts.items():
            state |= {stored + name: value for name, value in module.state_dict().items()}
        head = self.head.weight
        if head is not self.backbone.embed_tokens.weight:
            own = {"": head} if isinstance(head, Tensor) else head.state_dict(prefix=".")
            state |= {f"lm_head.weight{part}": value for part, value in own.items()}
        kind = str(self.dtype).removeprefix("torch.")
        config = {**self.config, "dtype": kind}
        config.pop("torch_dtype", None)
        if any(
            name.startswith("lm_head.") for name in state
        ):  # a file may tie them and store another head all the same
            config.pop("tie_embedding", None)
            config["tie_word_embeddings"] = False
        save_checkpoint(folder, state, config, copy_from=self.folder)
