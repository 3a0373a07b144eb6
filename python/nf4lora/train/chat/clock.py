"""The date that a chat template prints: that of the run's beginning, on whichever day it goes on.

Templates of Llama 3.2, gpt-oss, SmolLM3, Mistral Small and Granite write today's date into the system message. A run
that goes on from a checkpoint must take the same tokens, so that the checkpoint notes the moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from typing import Any, cast


@dataclass
class Clock:
    """A clock that stands still, and notes whether a template has looked at it."""

    moment: datetime = field(default_factory=lambda: datetime.now().replace(microsecond=0))
    read: bool = False

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within, chat templates see this clock (their only one is the function strftime_now)."""
        from transformers.utils import chat_template_utils

        clock, templates = self, cast("Any", chat_template_utils)

        class Standing(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
                clock.read = True
                return clock.moment.astimezone(tz) if tz else clock.moment

        before, templates.datetime = templates.datetime, Standing
        try:
            yield
        finally:
            templates.datetime = before

    @property
    def note(self) -> str:
        """What is to be said about the date; nothing where no template has asked for it."""
        if not self.read:
            return ""
        if self.moment.date() == datetime.now().date():
            return f"the chat template prints today's date, {self.moment:%Y-%m-%d}"
        return f"the chat template prints the date; that of the run's beginning is used, {self.moment:%Y-%m-%d}"
