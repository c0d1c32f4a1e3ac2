"""Speech over HTTP: transcription, speech, spoken chat answers and the realtime socket.

Found by the server through the entry point `lfm2_mm.routes`; importing the package imports nothing.
"""

from __future__ import annotations

__all__: list[str] = []
