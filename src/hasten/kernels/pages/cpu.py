"""Page moves through ``csrc/memory.cpp``."""

from __future__ import annotations

from hasten import _native

copy_pages = _native.copy_pages
move_slots = _native.move_slots
