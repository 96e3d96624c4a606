"""What a teacher says of every token of a `.pbin`, written down: its likeliest words and their probabilities.

A file is 8 bytes with the length of a JSON head, little-endian; the head, with blanks up to a multiple of 64 bytes; and
for each target of each sequence, in the order of the `.pbin`, K words (uint16, or uint32 for a vocabulary beyond it),
then K + 1 log-probabilities (float16), the last of all other words together. All are little-endian, at the head's
temperature. The teacher saw of the text what the student will: the sequence up to there, and nothing before it. So the
order of training does not matter, but how sequences are made does, and the head says that too.
"""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.data import DataConfig, open_sequences
from modalities.fingerprints import fingerprint
from modalities.kl import DistillConfig
from modalities.loss import Batch
from modalities.pbin import write_beside

OF_DATA = ("sampling", "reuse_last_target", "document_mask", "seq_len")
"""Of the data's fields, those that sequences depend on."""
LONGEST_HEAD = 1 << 20  # bytes, of a file that may be no such file
TOKENS_AT_ONCE = 512

Logits = Callable[[Batch], Iterator[Tensor]]
"""The logits [N, V] of a batch's tokens, some at a time."""


def row_type(k: int, vocab_size: int) -> np.dtype:
    words = "<u2" if vocab_size <= 1 << 16 else "<u4"
    return np.dtype([("words", words, (k,)), ("log_probs", "<f2", (k + 1,))])


def head_of(data: DataConfig, path: str, vocab_size: int, temperature: float) -> dict[str, Any]:
    """What a file for the sequences of `path` must say."""
    settings = {name: getattr(data, name) for name in OF_DATA}
    return {"data": fingerprint(Path(path)), "vocab_size": vocab_size, "temperature": temperature, **settings}


def write_notes(
    out: Path, data: DataConfig, path: str, vocab_size: int, k: int, temperature: float, logits: Logits, batch_size: int
) -> int:
    """Write the file for all sequences of `path`, made as `data` says; returns how many they are."""
    sequences = open_sequences(data, path, "", vocab_size)
    head = head_of(data, path, vocab_size, temperature) | {"k": k, "sequences": sequences.count}
    text = json.dumps(head).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with write_beside(out) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for first in range(0, sequences.count, batch_size):
            batch = sequences.read(np.arange(first, min(first + batch_size, sequences.count)))
            for logits_NV in logits(batch):
                words_NK, log_probs_NC = likeliest(logits_NV, k, temperature)
                rows = np.empty(len(words_NK), row_type(k, vocab_size))
                rows["words"], rows["log_probs"] = words_NK.cpu().numpy(), log_probs_NC.cpu().numpy()
                file.write(rows.data)
    return sequences.count


def likeliest(logits_NV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(the `k` likeliest words [N, K], their log-probabilities and that of the rest [N, K + 1])."""
    log_q_NV = (logits_NV.float() / temperature).log_softmax(1)
    known_NK, words_NK = log_q_NV.topk(k)
    # Summed over the rest itself: one minus the others would be noise where they are nearly all.
    rest_N1 = log_q_NV.scatter(1, words_NK, -torch.inf).logsumexp(1, keepdim=True)
    return words_NK, torch.cat((known_NK, rest_N1), 1)


def open_notes(config: DistillConfig, data: DataConfig, vocab_size: int) -> Callable[[np.ndarray], Batch] | None:
    """`read(numbers)` for sequences of the only source: `teacher_words` and `teacher_log_probs` as `kl` has them.

    None without `distill.teacher_topk`; a ValueError where that is for other data, sequences, words or temperature.
    """
    if not config.teacher_topk:
        return None
    path, temperature = Path(config.teacher_topk), config.temperature
    head, begin = read_head(path)
    if len(data.train) != 1:
        raise ValueError(f"{path} is for one file, but data.train has {len(data.train)}; merge them with prep.py merge")
    for name, wanted in head_of(data, data.train[0], vocab_size, temperature).items():
        if head.get(name) != wanted:
            where = {"vocab_size": "model.vocab_size", "temperature": "distill.temperature"}.get(name, f"data.{name}")
            if name == "data":
                raise ValueError(f"{path} was made for other data than {data.train[0]}; make it anew with --save-topk")
            raise ValueError(
                f"{path} was made with {name} {head.get(name)}, but {where} is {wanted}; "
                "change that, or make the file anew with --save-topk"
            )
    kind, shape = row_type(head["k"], vocab_size), (head["sequences"], data.seq_len)
    if path.stat().st_size != begin + kind.itemsize * shape[0] * shape[1]:
        raise ValueError(f"{path} is cut short or damaged; make it anew with --save-topk")
    rows_ST = np.memmap(path, kind, "r", begin, shape)

    def read(numbers: np.ndarray) -> Batch:
        rows_NT = rows_ST[numbers]
        words, log_probs = rows_NT["words"].astype(np.int32), rows_NT["log_probs"].astype(np.float32)
        return {"teacher_words": torch.from_numpy(words), "teacher_log_probs": torch.from_numpy(log_probs)}

    return read


def read_head(path: Path) -> tuple[dict[str, Any], int]:
    """(the head, where the rows begin [bytes]); a ValueError if it is no such file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length)) if length <= LONGEST_HEAD else {}
    except OSError as error:
        raise ValueError(f"distill.teacher_topk: {path} cannot be read ({error.strerror})") from None
    except (struct.error, ValueError):
        head = {}
    if not isinstance(head, dict) or not all(type(head.get(name)) is int for name in ("k", "sequences")):
        raise ValueError(f"{path} is no file of modalities.evaluate --save-topk")
    return head, 8 + length
