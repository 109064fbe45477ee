"""Seeded mutations of a file's bytes: what a bad disk, a cut transfer, a careless editor and a malicious sender make of it.

In: bytes and a `random.Random`. Out: other bytes. The operators know where JSON has values and keys, but write bytes, so what
comes out is often no JSON at all. The same generator state gives the same mutant.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"(?!\s*:)|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null')
"""A scalar that is not a key."""
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
ENTRY = re.compile(rb'"(?:[^"\\]|\\.)*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|-?[\d.eE+-]+|true|false|null|\[[^][{}]*\]|\{[^][{}]*\})')
"""A key with a value that holds no further level."""
STRANGE = (
    *(b"null", b"true", b"false", b"[]", b"{}", b'""', b"[[]]", b'{"":null}', b"[null]", b'[{"a":[]}]', b'["a","b"]'),
    *(b"0", b"-0", b"-1", b"1", b"2", b"0.5", b"-0.0", b"1e999", b"-1e999", b"1e308", b"1e-400", b"NaN", b"Infinity"),
    *(b"255", b"65536", b"2147483647", b"2147483648", b"4294967296", b"9223372036854775807", b"9223372036854775808"),
    *(b"18446744073709551616", b"-9223372036854775809", b"1" + b"0" * 30, b"1" + b"0" * 400, b"7" * 5000, b"1e15", b"1e30"),
    *(b'"\\u0000"', b'"\\ud800"', b'"\\udcff"', b'"a\\nb"', b'"../../outside"', b'"/etc/passwd"', b'"."', b'"~"', b'"nan"'),
    *(b'"' + b"x" * 300 + b'"', b'"' + b"y" * 70_000 + b'"', b'"{{ 1 }}"', b'"%s"', b'"\xf0\x9f\x92\xa9"', b'"\xe2\x80\xae"'),
)
NOT_UTF8 = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\x80", b"\xfe\xff", b"\xef\xbb\xbf")

Random = random.Random


def mutate(data: bytes, rng: Random) -> bytes:
    """Return `data` after one to three mutations; never `data` itself unless it is empty."""
    out = data
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        out = rng.choices(OPERATORS, WEIGHTS)[0](out, rng)
    return out if out != data else flip_bit(data, rng)


def _run(data: bytes, rng: Random, most: int = 40) -> tuple[int, int]:
    """Return begin and end of a random run."""
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + rng.randint(1, most))


def _replace(data: bytes, match: re.Match[bytes], new: bytes) -> bytes:
    return data[: match.start()] + new + data[match.end() :]


def _pick(pattern: re.Pattern[bytes], data: bytes, rng: Random) -> re.Match[bytes] | None:
    """Return a random match: one near a random place, or in small files any of all."""
    start = rng.randrange(len(data) + 1)
    if len(data) < 20_000:
        found = list(pattern.finditer(data))
        return rng.choice(found) if found else None
    return pattern.search(data, start) or pattern.search(data)


def flip_bit(data: bytes, rng: Random) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def overwrite(data: bytes, rng: Random) -> bytes:
    begin, end = _run(data, rng, 8)
    return data[:begin] + rng.randbytes(end - begin) + data[end:]


def delete(data: bytes, rng: Random) -> bytes:
    begin, end = _run(data, rng, rng.choice((1, 1, 4, 40, 400)))
    return data[:begin] + data[end:]


def insert(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(rng.randint(1, 8)), rng.choice(b'[]{}",:0- \n').to_bytes(1))) + data[at:]


def duplicate(data: bytes, rng: Random) -> bytes:
    begin, end = _run(data, rng, 200)
    return data[:end] + data[begin:end] * rng.choice((1, 1, 3)) + data[end:]


def swap_runs(data: bytes, rng: Random) -> bytes:
    (a, b), (c, d) = sorted((_run(data, rng), _run(data, rng)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def nul(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + b"\0" * rng.choice((1, 4, 64)) + data[at:]


def not_utf8(data: bytes, rng: Random) -> bytes:
    at = rng.choice((0, rng.randrange(len(data) + 1)))
    return data[:at] + rng.choice(NOT_UTF8) + data[at:]


def tweak_number(data: bytes, rng: Random) -> bytes:
    match = _pick(NUMBER, data, rng)
    if match is None:
        return flip_bit(data, rng)
    text = match[0]
    choices = [
        b"-" + text,
        text + b"0",
        b"1" + text,
        text + rng.randbytes(1),
        text[:-1] or b"0",
        b"0" + text,
        text + b".5",
        text + b"e9",
    ]
    if text.isdigit():
        value = int(text)
        choices += [b"%d" % n for n in (value + 1, max(0, value - 1), value * 2, value // 2, value ^ (1 << rng.randrange(40)))]
    return _replace(data, match, rng.choice(choices))


def replace_value(data: bytes, rng: Random) -> bytes:
    match = _pick(VALUE, data, rng)
    return flip_bit(data, rng) if match is None else _replace(data, match, rng.choice(STRANGE))


def replace_entry(data: bytes, rng: Random) -> bytes:
    """Give a key another value, whatever it held: a list or an object may go."""
    match = _pick(ENTRY, data, rng)
    if match is None:
        return flip_bit(data, rng)
    key = match[0][: re.match(rb'"(?:[^"\\]|\\.)*"\s*:', match[0]).end()]  # type: ignore[union-attr]
    return _replace(data, match, key + rng.choice(STRANGE))


def delete_entry(data: bytes, rng: Random) -> bytes:
    match = _pick(ENTRY, data, rng)
    if match is None:
        return delete(data, rng)
    end = match.end() + (data[match.end() : match.end() + 1] == b",")
    return data[: match.start()] + data[end:]


def duplicate_key(data: bytes, rng: Random) -> bytes:
    match = _pick(ENTRY, data, rng)
    if match is None:
        return duplicate(data, rng)
    key = match[0][: match[0].index(b":") + 1]
    return _replace(data, match, match[0] + b"," + key + rng.choice(STRANGE))


def swap_values(data: bytes, rng: Random) -> bytes:
    one, other = _pick(VALUE, data, rng), _pick(VALUE, data, rng)
    if one is None or other is None or one.start() == other.start():
        return flip_bit(data, rng)
    first, second = sorted((one, other), key=lambda m: m.start())
    return data[: first.start()] + second[0] + data[first.end() : second.start()] + first[0] + data[second.end() :]


def nest(data: bytes, rng: Random) -> bytes:
    """Put a value many levels down, closed or not."""
    depth, (left, right) = rng.choice((3, 50, 130, 990, 5_000, 200_000)), rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    match = _pick(VALUE, data, rng)
    if match is None:
        return left * depth
    return _replace(data, match, left * depth + match[0] + right * rng.choice((depth, 0)))


WEIGHTED: dict[Callable[[bytes, Random], bytes], int] = {
    flip_bit: 3, overwrite: 1, delete: 2, insert: 2, duplicate: 1, swap_runs: 1, truncate: 1, nul: 1, not_utf8: 1,
    tweak_number: 4, replace_value: 6, replace_entry: 5, delete_entry: 2, duplicate_key: 2, swap_values: 2, nest: 2,
}  # fmt: skip
OPERATORS, WEIGHTS = [*WEIGHTED], [*WEIGHTED.values()]


def mutate_header(data: bytes, rng: Random) -> bytes:
    """Mutate a safetensors file: the 8 bytes that give the header's length, the header, or seldom the file's size."""
    length = int.from_bytes(data[:8], "little")
    prefix, header, rest = data[:8], data[8 : 8 + length], data[8 + length :]
    what = rng.random()
    if what < 0.2:
        sizes = (0, 1, 2, length - 1, length + 1, len(data), len(data) - 8, 10**8, 10**8 + 1, 1 << 31, 1 << 63, (1 << 64) - 1)
        return (
            rng.choice((flip_bit(prefix, rng), overwrite(prefix, rng), rng.choice(sizes).to_bytes(8, "little"))) + header + rest
        )
    if what < 0.3:
        return rng.choice((truncate(data, rng), data + rng.randbytes(rng.randint(1, 9)), data[: -rng.randint(1, 99)]))
    header = mutate(header, rng)
    return (len(header).to_bytes(8, "little") if rng.random() < 0.8 else prefix) + header + rest
