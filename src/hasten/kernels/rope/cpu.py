"""Rotation and append through ``csrc/ops/rope.cpp``."""

from __future__ import annotations

from hasten import _native

append = _native.append
