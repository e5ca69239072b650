"""How the fuzz harness harms files."""

import json
import os
import random
from typing import Any

Seeds = dict[str, bytes]


class WrongError(Exception):
    """A reader that took a damaged file and answered otherwise than for the whole one."""


NUMBERS = (
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 64) - 1,
)
TEXTS = (
    b"nan", b"inf", b"-1", b"0", b"1e308", b"99999999999999999999", b"null", b"true", b"[]", b"{}", b'""', b"..", b"/",
    b"\0", b"\n", b"\xff\xfe", b"\xed\xa0\x80", b"*a", b"&a", b"[" * 300,
    b"!!python/object/apply:os.system [touch hacked]",
)  # fmt: skip


def harmed(data: bytes, rng: random.Random, others: tuple[bytes, ...] = ()) -> bytes:
    """A file with one to four faults, most of them where formats keep their structure: at both ends."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        n = len(out)
        if not n:
            break
        span = rng.choice((n, n, min(n, 64), min(n, 1024), min(n, 8192)))
        at = rng.randrange(span) if rng.random() < 0.6 else n - 1 - rng.randrange(span)
        what = rng.randrange(10)
        if what == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at] = rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif what in (2, 3):
            size = rng.choice((1, 2, 4, 8))
            number = (rng.choice(NUMBERS) + rng.randrange(-2, 3)) % (1 << 8 * size)
            out[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif what == 4:
            del out[at : at + rng.choice((1, 2, 8, 64, n))]
        elif what == 5:
            out[at:at] = out[at : at + rng.choice((1, 4, 12, 64))]
        elif what == 6:
            out[at:at] = rng.choice(TEXTS)
        elif what == 7:
            text = rng.choice(TEXTS)
            out[at : at + len(text)] = text
        elif what == 8 and others:
            other = rng.choice(others)
            start = rng.randrange(max(1, len(other)))
            piece = other[start : start + rng.choice((4, 16, 256, 4096))]
            out[at : at + len(piece)] = piece
        else:
            digits = [i for i in range(max(0, at - 40), min(n, at + 40)) if 48 <= out[i] < 58]
            for i in digits[: rng.randrange(4)]:
                out[i] = rng.choice(b"0123456789.-eE")
    return bytes(out)


def any_json(rng: random.Random, depth: int = 0) -> Any:
    """A value that JSON or YAML can hold, odd ones preferred."""
    kind = rng.randrange(12 if depth < 4 else 8)
    if kind < 2:
        return rng.choice((0, 1, -1, 2**31, 2**63, 10**30, rng.randrange(1000)))
    if kind < 4:
        return rng.choice((0.5, -0.0, 1e308, float("nan"), float("inf"), rng.uniform(-1e4, 1e4)))
    if kind < 6:
        return rng.choice(("", "a", "0.25", "\0", "ä\u202e", "x" * 5000, "../../etc", "Polygon", "tile", "nan"))
    if kind < 8:
        return rng.choice((None, True, False))
    if kind < 10:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(5))]
    names = ("type", "geometry", "coordinates", "features", "tissue", "maps", "mpp", "halo_px", "name", "")
    return {rng.choice(names): any_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part of it replaced, doubled or left out."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return any_json(rng)
    if isinstance(value, list):
        at, out = rng.randrange(len(value)), list(value)
        what = rng.randrange(4)
        out[at : at + 1] = [] if what == 0 else [out[at]] * 3 if what == 1 else [changed(out[at], rng)]
        return out
    key = rng.choice(list(value))
    if rng.random() < 0.15:
        return {name: part for name, part in value.items() if name != key}
    return {**value, key: changed(value[key], rng)}


def text_or_bytes(value: Any, rng: random.Random) -> bytes:
    """Usually JSON of a changed value, else of the whole one with harmed bytes."""
    text = json.dumps(changed(value, rng) if rng.random() < 0.8 else value).encode()
    return harmed(text, rng) if rng.random() < 0.3 else text


class Payload:
    """What pickle would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)
