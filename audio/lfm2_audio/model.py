"""A loaded LFM2-Audio and its verbs: `transcribe`, `speak`, `reply`, `converse`.

Puts the parts together for callers; the engine runs every step, and one engine serves all verbs at
once. `ask`, `chat` and `logits` are those of every model, text out. Knows no file format and no
sound device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from lfm2_audio.config import AudioConfig
from lfm2_audio.conversation import Conversation
from lfm2_audio.frames import FrameEmbedding, FrameEncoder
from lfm2_audio.prompts import (
    CONVERSATION,
    READ,
    SPOKEN,
    asr_prompt,
    audio_sampling,
    drawn,
    tts_prompt,
)
from lfm2_audio.repetition import LoopWatch
from lfm2_audio.results import Reply, Transcript, together
from lfm2_audio.segments import RATE, Cutting, hear, joined
from lfm2_audio.sounding import checked, chunks, finished, sound
from lfm2_audio.speech_head import Speech, SpeechHead
from lfm2_audio.waveform import MAX_SECONDS, Audio, read_audio
from lfm2_mm.errors import InputError
from lfm2_mm.events import AudioFrame, Done, TextDelta
from lfm2_mm.model import Model
from lfm2_mm.request import Handle, Request
from lfm2_mm.sampling import Sampling

if TYPE_CHECKING:
    from lfm2_audio.codec import Codec
    from lfm2_audio.depthformer import Depthformer
    from lfm2_audio.encoder import AudioEncoder
    from lfm2_audio.voice.live import Live
    from lfm2_mm.backbone import Backbone
    from lfm2_mm.checkpoint import Checkpoint
    from lfm2_mm.quantize.layers import Packed
    from lfm2_mm.tokenizer import Tokenizer

__all__ = ["AudioModel"]

_MAX_TEXT = 4000  # characters that are said in one go
_CONTEXTS_KEPT = 4  # full contexts whose states are kept at most, where that is less than usual


@dataclass(kw_only=True)
class AudioModel(Model):
    """A model that hears and speaks; made by `lfm2_mm.load`.

    Attributes:
        audio_config: The checkpoint's config, read.
        speech: The head of everything that speaks.
        frame_encoder: Speech that the model said, as input.
        described: Whether voices are described in words (LFM2-Audio) or named (LFM2.5-Audio).
        spoken: How codes of a conversation are chosen where a call says nothing.
        read: How codes of a text read aloud are chosen.
    """

    audio_config: AudioConfig
    speech: SpeechHead
    frame_encoder: FrameEncoder
    open_codec: Callable[[], Codec]
    described: bool = False
    spoken: Sampling = SPOKEN
    read: Sampling = READ
    _codec: Codec | None = field(default=None, repr=False)

    @classmethod
    def assemble(  # type: ignore[override]
        cls,
        checkpoint: Checkpoint,
        backbone: Backbone,
        head: Tensor | Packed,
        tokenizer: Tokenizer,
        *,
        config: AudioConfig,
        encoder: AudioEncoder,
        frames: FrameEmbedding,
        depthformer: Depthformer,
        parts: Mapping[str, nn.Module],
        open_codec: Callable[[], Codec],
    ) -> AudioModel:
        """Put the parts of a checkpoint together.

        Raises:
            CheckpointError: if the tokenizer lacks a token that steers speech.
            SettingError: if `generation_config.json` holds an unusable value.
        """
        base = Model.assemble(checkpoint, backbone, head, tokenizer)
        speech = SpeechHead(
            base.head,
            depthformer,
            frames,
            tokenizer,
            n_text=config.interleaved_n_text,
            n_audio=config.interleaved_n_audio,
        )
        chosen = checkpoint.json("generation_config.json") or {}
        model = cls(
            **{f.name: getattr(base, f.name) for f in fields(Model)},
            audio_config=config,
            speech=speech,
            frame_encoder=FrameEncoder(frames, token_id=encoder.token_id),
            open_codec=open_codec,
            described=not (checkpoint.folder / "audio_detokenizer").is_dir(),
            spoken=audio_sampling(chosen, SPOKEN),
            read=audio_sampling(chosen, READ),
        )
        model.parts = dict(parts)
        model.attach(encoder)
        prefixes = model.engine.prefixes  # a long talk leaves stale ones: no more than it can use
        prefixes.max_bytes = min(prefixes.max_bytes, _CONTEXTS_KEPT * model.context_bytes)
        return model

    @property
    def codec(self) -> Codec:
        """What turns codes into sound; opened when it is first needed.

        Raises:
            CheckpointError: if the checkpoint holds none, or it cannot be used.
        """
        if self._codec is None:
            self._codec = self.open_codec()
        return self._codec

    @property
    def max_positions(self) -> int:
        """What the context holds: tokens, rows of sound heard, frames said."""
        return self.backbone.config.max_positions

    @property
    def context_bytes(self) -> int:
        """Bytes of keys and values of a full context."""
        config = self.backbone.config
        width = len(config.attention_layers) * config.n_kv_heads * config.head_dim
        return 2 * width * self.dtype.itemsize * config.max_positions

    # -- hearing -----------------------------------------------------------------------------

    def transcribe(
        self,
        source: Any,
        *,
        language: str | None = None,
        timestamps: bool = False,
        max_seconds: float | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Transcript:
        """Write down what is said; long recordings are cut at silences.

        Args:
            source: A path, URL, bytes, an `Audio`, or what else `read_audio` takes.
            language: What is spoken, for models that were trained to be told.
            timestamps: Cut into short segments, whose times say when something was said.
            max_seconds: Refuse longer recordings.
            progress: Told after each piece how many seconds are done.

        Raises:
            AudioError: if the recording cannot be read.
        """
        audio = read_audio(source, rate=RATE, max_seconds=max_seconds or MAX_SECONDS)
        parts = list[Done]()

        def listen(piece: Audio) -> str:
            text, done = self._listen(piece, language)
            parts.append(done)
            return text

        cutting = Cutting.for_subtitles() if timestamps else None
        segments = tuple(hear(audio, listen, cutting=cutting, progress=progress))
        return Transcript(joined(segments), segments, together(parts))

    def transcribe_stream(
        self, piece: Audio, *, language: str | None = None, temperature: float = 0.0
    ) -> Handle:
        """Write down what is said in one piece of up to about half a minute.

        The handle's events are text as it comes; whoever reads it looks out for loops
        (`lfm2_audio.repetition.LoopWatch`) and cuts long recordings (`lfm2_audio.segments.hear`).

        Args:
            piece: Any rate.
            language: As for `transcribe`.
            temperature: How freely words are chosen; 0 always takes the likeliest.
        """
        conversation = Conversation(asr_prompt(language)).user(piece)
        speech = Speech(head=self.speech, mode="sequential", text=Sampling(temperature=temperature))
        return self._run(conversation, speech, int(64 + 16 * piece.duration))

    def _listen(self, piece: Audio, language: str | None) -> tuple[str, Done]:
        """Text of one piece; a model that repeats itself is stopped."""
        handle = self.transcribe_stream(piece, language=language)
        text, watch = "", LoopWatch()
        for event in checked(handle):
            if isinstance(event, TextDelta):
                text += event.text
                if watch.feed(event.text):
                    handle.cancel()
        return text, finished(handle)

    # -- speaking ----------------------------------------------------------------------------

    @overload
    def speak(self, text: str, *, stream: Literal[False] = ..., **options: Any) -> Audio: ...

    @overload
    def speak(self, text: str, *, stream: Literal[True], **options: Any) -> Iterator[Audio]: ...

    def speak(self, text: str, *, stream: bool = False, **options: Any) -> Audio | Iterator[Audio]:
        """Read a text aloud.

        Args:
            text: The words; a sentence or two sound best.
            stream: Return chunks as they are made, the first one soon. Together they are the whole
                within 1e-5 of its peak. Dropping the iterator cancels the rest.
            **options: As for `speak_stream`.

        Raises:
            InputError: if there is no text, or too much.
            SettingError: if the model has no such voice, or a setting is out of range.
        """
        handle = self.speak_stream(text, **options)
        return chunks(self.codec, handle) if stream else sound(self.codec, checked(handle))

    def speak_stream(
        self,
        text: str,
        *,
        voice: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float = 60.0,
    ) -> Handle:
        """Read a text aloud; the handle's events are frames, for a stream of `codec` to decode.

        A frame whose first code is 2048 ends speech and has no sound. Errors are those of `speak`.

        Args:
            text: A sentence or two.
            voice: Who speaks; see `lfm2_audio.prompts.tts_prompt`.
            temperature: How freely codes are drawn; 0 always takes the likeliest.
            top_k: Keep so many of the likeliest codes.
            seed: Makes the draws repeatable.
            max_seconds: Stop after so much speech.
        """
        words = " ".join(text.split())
        if not words or len(words) > _MAX_TEXT:
            raise InputError(
                f"the text has {len(words)} characters; give between 1 and {_MAX_TEXT}, longer "
                "texts in parts"
            )
        frames = max(int(max_seconds * self.codec.rate / self.codec.samples_per_frame), 1)
        speech = Speech(
            head=self.speech,
            mode="sequential",
            audio=self._drawn(self.read, temperature, top_k, seed),
            max_frames=frames,
        )
        conversation = Conversation(tts_prompt(voice, described=self.described)).user(words)
        return self._run(conversation, speech, frames + 256)

    def _drawn(
        self, usual: Sampling, temperature: float | None, top_k: int | None, seed: int | None
    ) -> Sampling:
        """How codes are chosen; where they are drawn, the codec says which have a sound."""
        sampling = drawn(usual, temperature, top_k, seed)
        if not sampling.greedy:
            self.speech.sounds = self.codec.entries
        return sampling

    # -- conversation ------------------------------------------------------------------------

    def conversation(self, system: str | None = None) -> Conversation:
        """An empty conversation, to be continued with `.user(…)`.

        Args:
            system: The system prompt; by default what makes the model answer in text and speech.
        """
        return Conversation(
            CONVERSATION if system is None else system, chunk=self.audio_config.interleaved_n_audio
        )

    def reply(self, source: Any, *, system: str | None = None, **options: Any) -> Reply:
        """Answer a spoken question, or the last turn of a conversation, in text and speech.

        Args:
            source: A recording (path, bytes, `Audio`), or a `Conversation` that ends with the user.
            system: The system prompt, where no conversation is given.
            **options: As for `reply_stream`.

        Raises:
            AudioError: if the recording cannot be read.
            InputError: if it is no user's turn that is to be answered.
            ContextOverflow: if the last turn alone does not fit.
        """
        from lfm2_audio.voice.context import fitted, limit

        began = time.perf_counter()
        if isinstance(source, Conversation):
            asked = source
        else:
            asked = self.conversation(system).user(read_audio(source))
        voice: Any = self
        fit = fitted(voice, asked, limit(voice, None), keep=0.7)
        dropped = 0
        if fit is not None:
            assert isinstance(fit.conversation, Conversation)
            asked, dropped = fit.conversation, fit.dropped
        handle = self.reply_stream(asked, began=began, **options)
        events = list(checked(handle))
        answered = asked.assistant([e for e in events if isinstance(e, TextDelta | AudioFrame)])
        text, audio = answered.turns[-1].text, sound(self.codec, events)
        return Reply(text, audio, answered, finished(handle), dropped)

    def reply_stream(
        self,
        conversation: Conversation,
        *,
        max_frames: int | None = None,
        max_tokens: int = 1024,
        temperature: float | None = None,
        top_k: int | None = None,
        text_temperature: float = 0.0,
        text_top_k: int = 0,
        seed: int | None = None,
        began: float | None = None,
    ) -> Handle:
        """Answer the last turn; the handle's events are text and frames as they come.

        Hand the events to `conversation.assistant(…)` to continue: what was computed is found
        again, also behind a `cut`. A frame whose first code is 2048 ends speech and has no sound.

        Args:
            conversation: Ends with the user's turn.
            max_frames: Frames at most.
            max_tokens: Tokens and frames at most.
            temperature: How freely codes are drawn; 0 always takes the likeliest.
            top_k: Keep so many of the likeliest codes.
            text_temperature: The same for tokens; greedy by default.
            text_top_k: The same for tokens.
            seed: Makes the draws repeatable.
            began: `time.perf_counter()` at which the caller started.

        Raises:
            InputError: if there is no user's turn to be answered.
            ContextOverflow: if the conversation does not fit into the context.
        """
        if not conversation.turns or conversation.turns[-1].role != "user":
            raise InputError("the conversation does not end with a user's turn; add one with .user")
        speech = Speech(
            head=self.speech,
            mode="interleaved",
            text=Sampling(temperature=text_temperature, top_k=text_top_k, seed=seed),
            audio=self._drawn(self.spoken, temperature, top_k, seed),
            max_frames=max_frames,
        )
        return self._run(conversation, speech, max_tokens, began)

    def warm(self, conversation: Conversation) -> Handle:
        """Compute a conversation ahead of its answer, or of the turn that will follow.

        The handle reports nothing but the end; whoever reads it drives the engine.
        """
        return self.engine.submit(Request(prompt=conversation.to_prompt(self), prefill_only=True))

    def converse(
        self, conversation: Conversation | None = None, *, system: str | None = None, **options: Any
    ) -> Live:
        """Talk, with microphone and loudspeaker; to be entered with `with`.

        Args:
            conversation: What was said before.
            system: The system prompt, where no conversation is given.
            **options: As for `lfm2_audio.voice.live.converse`.
        """
        from lfm2_audio.voice.live import converse

        voice: Any = self
        return converse(voice, conversation or self.conversation(system), **options)

    # -- all of them -------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the model in the official layout, codec and tokenizer beside it.

        Raises:
            InputError: if the folder holds something else.
        """
        from lfm2_audio.saving import save_model

        save_model(
            folder,
            backbone=self.backbone,
            parts=self.parts,
            config=self.config,
            copy_from=self.folder,
        )

    def _run(
        self, conversation: Conversation, speech: Speech, steps: int, began: float | None = None
    ) -> Handle:
        began = time.perf_counter() if began is None else began
        prompt = conversation.to_prompt(self)
        return self.engine.submit(
            Request(prompt=prompt, generation=speech, max_tokens=steps, began=began)
        )
