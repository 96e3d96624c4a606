"""A list of `(offset, length)` pairs as the bytes of its pickle, written and read piece by piece.

An `.idx` file and the end of a `.pbin` are `pickle.dumps([(offset, length), …], protocol=4)`. Both ways go through
numpy in pieces, so that a billion documents need no more memory than a thousand. Reading knows the few opcodes that
such a list is made of and refuses every other: a file cannot name a function, still less call it.
Source of the format: CPython's `Lib/pickletools.py`; of its batches and frames, `Modules/_pickle.c`.
"""

import pickle
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

PIECE_BYTES = 1 << 20
# Python 3.14 would write protocol 5; Modalities' files, and so ours, have 4 on every Python.
PROTOCOLS = (4, 5)
# CPython's numbers: the files are the same to the byte only with the same.
BATCH = 1000
FRAME_BYTES = 64 * 1024
SMALLEST_FRAME = 4

LIST = pickle.EMPTY_LIST + pickle.MEMOIZE
PAIR_END = pickle.TUPLE2 + pickle.MEMOIZE
NEXT_BATCH = pickle.APPENDS + pickle.MARK
# A number takes 1, 2 or 4 bytes after its opcode, or 5 to 8 after an opcode and a size.
BOUNDS = np.array([2**8, 2**16, 2**31, 2**39, 2**47, 2**55])
OPCODES = np.frombuffer(pickle.BININT1 + pickle.BININT2 + pickle.BININT + 4 * pickle.LONG1, np.uint8)
SIZES = np.array([1, 2, 4, 5, 6, 7, 8])
LONG1 = pickle.LONG1[0]
# Bytes of a number, its opcode included; 0: no number begins so. LONG1 tells its own size.
WIDTHS = np.zeros(256, np.int64)
WIDTHS[OPCODES[:3]] = 1 + SIZES[:3]
LARGEST_PAIR = len(NEXT_BATCH) + 2 * (2 + 8) + len(PAIR_END)


# ---------------------------------------------------------------------------------------------------------------- write


def write_pairs(file: BinaryIO, pieces: Iterable[np.ndarray]) -> None:
    """Write what `pickle.dump(every pair, file, protocol=4)` would, to the byte; `pieces` are int64 [N, 2], not < 0."""
    file.write(pickle.PROTO + bytes([PROTOCOLS[0]]))
    frame = bytearray(LIST)
    alone = False
    for i, batch in enumerate(_batches(pieces)):
        alone = i == 0 and len(batch) == 1
        frame += b"" if alone else NEXT_BATCH if i else pickle.MARK
        pickled, starts = _pickled(batch)
        # The pickler looks before each number whether its frame is full; a batch is too short to fill two.
        full = int(np.searchsorted(starts, FRAME_BYTES - len(frame)))
        if full < len(starts):
            _write_frame(file, frame + pickled[: starts[full]])
            frame, pickled = bytearray(), pickled[starts[full] :]
        frame += pickled
    end = b"" if frame == LIST else pickle.APPEND if alone else pickle.APPENDS
    _write_frame(file, frame + end + pickle.STOP)


def _batches(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same pairs in arrays of BATCH, the last one shorter."""
    rest = np.empty((0, 2), np.int64)
    for piece in pieces:
        rest = np.concatenate((rest, piece))
        whole = len(rest) - len(rest) % BATCH
        yield from np.split(rest[:whole], range(BATCH, whole, BATCH)) if whole else ()
        rest = rest[whole:]
    if len(rest):
        yield rest


def _write_frame(file: BinaryIO, frame: bytes | bytearray) -> None:
    if len(frame) >= SMALLEST_FRAME:
        file.write(pickle.FRAME + struct.pack("<Q", len(frame)))
    file.write(frame)


def _pickled(pairs: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The opcodes of `pairs`, and where in them each number starts, int64 [2N]."""
    numbers = pairs.astype("<i8").ravel()
    assert numbers.min(initial=0) >= 0
    kind = np.searchsorted(BOUNDS, numbers, side="right")
    long = kind >= 3
    cells = np.zeros((len(numbers), 2 + 8), np.uint8)
    payload = numbers.view(np.uint8).reshape(-1, 8)
    cells[:, 0] = OPCODES[kind]
    cells[~long, 1:9] = payload[~long]
    cells[long, 1], cells[long, 2:] = SIZES[kind[long]], payload[long]
    widths = (1 + long + SIZES[kind]).reshape(-1, 2)
    used = (np.arange(10) < widths[..., None]).reshape(len(pairs), 20)
    rows = np.hstack((cells.reshape(len(pairs), 20), np.tile(np.frombuffer(PAIR_END, np.uint8), (len(pairs), 1))))
    pickled = rows[np.hstack((used, np.ones((len(pairs), 2), bool)))].tobytes()
    ends = np.cumsum(widths.sum(1) + len(PAIR_END))
    seconds = ends - len(PAIR_END) - widths[:, 1]
    return pickled, np.stack((seconds - widths[:, 0], seconds), 1).ravel()


# ----------------------------------------------------------------------------------------------------------------- read


def read_pairs(file: BinaryIO, num_bytes: int) -> Iterator[np.ndarray]:
    """The pairs in the next `num_bytes` of `file`, in pieces, int64 [N, 2]; `ValueError` where it is no such list."""
    pieces = _gathered(_unframed(file, num_bytes))
    data = next(pieces, b"")
    if not data.startswith(LIST):
        raise ValueError("it is not a list of pairs")
    data = data[len(LIST) :]
    if data == pickle.STOP:
        return
    many = data.startswith(pickle.MARK)
    data, end = data[many:], (pickle.APPENDS if many else pickle.APPEND) + pickle.STOP
    for piece in pieces:
        pairs, consumed = _parse(data)
        yield pairs
        data = data[consumed:]
        if len(data) > LARGEST_PAIR:
            raise ValueError("it holds something else than pairs of numbers")
        data += piece
    pairs, consumed = _parse(data)
    yield pairs
    if data[consumed:] != end or (not many and len(pairs) != 1):
        broken = len(data) - consumed <= LARGEST_PAIR and not data.endswith(pickle.STOP)
        raise ValueError("it breaks off" if broken else "it holds something else than pairs of numbers")


def _unframed(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    """The opcodes of a pickle without its frames, in pieces of at most PIECE_BYTES."""
    head = file.read(2)
    if num_bytes < 3 or head[:1] != pickle.PROTO or head[1] not in PROTOCOLS:
        raise ValueError("it is not a pickle of protocol 4 or 5")
    left = num_bytes - 2
    while left > 0:
        size = left
        head = file.read(min(9, left))
        if head[:1] == pickle.FRAME:
            if len(head) < 9:
                raise ValueError("it breaks off")
            (size,) = struct.unpack("<Q", head[1:])
            left -= 9
        else:
            file.seek(-len(head), 1)
        if size > left:
            raise ValueError("it breaks off")
        left -= size
        while size:
            piece = file.read(min(size, PIECE_BYTES))
            if not piece:
                raise ValueError("it breaks off")
            size -= len(piece)
            yield piece


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in larger pieces: frames may be as small as a byte, and each piece costs some time."""
    waiting, size = [], 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


def _parse(data: bytes) -> tuple[np.ndarray, int]:
    """The whole pairs at the beginning of `data`, int64 [N, 2], and the bytes that they take.

    Every place where a pair's last two opcodes stand may be its end. From each such place the opcodes tell where the
    next pair would end; following them from the beginning leaves out places that are really the middle of a number.
    """
    codes = np.frombuffer(data + bytes(LARGEST_PAIR), np.uint8)
    ends = np.flatnonzero((codes[:-1] == PAIR_END[0]) & (codes[1:] == PAIR_END[1])) + len(PAIR_END)
    places = np.concatenate(([0], ends))
    starts = places + 2 * ((codes[places] == NEXT_BATCH[0]) & (codes[places + 1] == NEXT_BATCH[1]))
    seconds = starts + _widths(codes, starts)
    due = seconds + _widths(codes, seconds) + len(PAIR_END)
    after = np.searchsorted(places, due)
    sound = (seconds > starts) & (due > seconds + len(PAIR_END)) & (after < len(places))
    sound[sound] = places[after[sound]] == due[sound]

    chosen, k = [], 0
    jumps = np.flatnonzero(~sound | (after != np.arange(1, len(after) + 1)))
    for jump in jumps.tolist():
        if jump < k:
            continue  # inside a number
        chosen.append(np.arange(k, jump + int(sound[jump])))
        k = jump
        if not sound[jump]:
            break
        k = int(after[jump])
    index = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
    return np.stack((_numbers(codes, starts[index]), _numbers(codes, seconds[index])), 1), int(places[k])


def _widths(codes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The bytes of the numbers that begin `at` these places, opcodes included; 0 where none begins."""
    widths = WIDTHS[codes[at]]
    long = codes[at] == LONG1
    size = codes[at + long]
    return np.where(long & (size >= 1) & (size <= 8), 2 + size.astype(np.int64), widths)


def _numbers(codes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The numbers that begin `at` these places, int64; those of 4 bytes and more are signed, as in any pickle."""
    long = codes[at] == LONG1
    bits = 8 * (_widths(codes, at) - 1 - long)
    payload = np.lib.stride_tricks.sliding_window_view(codes, 8)[at + 1 + long]
    unused = (64 - bits).astype(np.uint64)
    signed = (payload.copy().view("<u8").ravel() << unused).view(np.int64) >> unused.astype(np.int64)
    return np.where(bits < 32, signed & ((1 << np.minimum(bits, 32)) - 1), signed)
