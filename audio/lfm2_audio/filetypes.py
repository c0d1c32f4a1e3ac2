"""What a file that cannot be read as sound is instead, by its first bytes.

Knows beginnings of files and sentences; reads nothing itself.
"""

from __future__ import annotations

__all__ = ["not_sound", "plain"]

_STARTS = {  # what people take for sound, and libsndfile does not read
    b"\x1a\x45\xdf\xa3": "a Matroska or WebM file",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive or office document",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"ADIF": "an AAC file",
    b"#!AM": "an AMR file",
}


def not_sound(start: bytes, name: str, error: Exception) -> str:
    """Why a file is no recording that can be read: a sentence that says what it is instead.

    Args:
        start: Its first 16 bytes.
        name: How messages name it.
        error: What libsndfile said.
    """
    known = next((what for magic, what in _STARTS.items() if start.startswith(magic)), None)
    if start[4:8] == b"ftyp":
        known = "an MP4, M4A or MOV file"
    if known is not None:
        return (
            f"{name} is {known}, which cannot be read here; convert it first, as with "
            "ffmpeg -i FILE out.wav"
        )
    mp3 = start[:3] == b"ID3" or (start[:1] == b"\xff" and start[1:2] >= b"\xe0")
    if mp3 or start[:4] in (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM"):
        return (
            f"{name} begins like a sound file but is damaged or cut short ({plain(error)}); "
            "save or download it again"
        )
    return (
        f"{name} is not a recording that can be read here (it begins with "
        f"{start.decode('latin-1')!r}); WAV, FLAC, Ogg, MP3, AIFF, AU and CAF files work"
    )


def plain(error: Exception) -> str:
    """The words of libsndfile, without the name of the file that it repeats."""
    text = getattr(error, "error_string", None) or str(error)
    return " ".join(str(text).split()).rstrip(".")[:120]
