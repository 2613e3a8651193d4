"""A preprocessed dataset, opened and checked; `preprocess` writes one. The format is in docs/data.md."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_polar import log
from megatron_polar.data.lines import INPUT_SUFFIXES
from megatron_polar.data.preprocess import preprocess
from megatron_polar.data.preprocess_report import PreprocessReport
from megatron_polar.data.storage import (
    HEADER_FIELDS,
    INDEX,
    KINDS,
    REFERENCE,
    TOKENS,
    WORK,
    check_content,
    check_dataset,
    fingerprint_of,
    read_dataset_manifest,
)
from megatron_polar.data.template import WRAPPERS, ControlTokens, Half
from megatron_polar.data.tokenizer import Tokenizer
from megatron_polar.errors import UserError
from megatron_polar.manifest import MANIFEST, Damaged, check_hash

__all__ = ["Corpus", "PreprocessReport", "StoredDocument", "preprocess"]


@dataclass(frozen=True)
class StoredDocument:
    """One prompt: `kind` "trajectories" (halves in input order) or "preference" (references, then best .. worst).

    `policy_ids` is int32 [number of halves], positions in the corpus' policies, -1 where unknown. `num_references` is 0
    for trajectories, each of which may be one.
    """

    kind: str
    wrapper: str
    policy_ids: np.ndarray
    halves: tuple[Half, ...]
    num_references: int = 0


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Turn what is wrong with a dataset directory, or with the disk below it, into an error of one line."""
    try:
        yield
    except Damaged as error:
        raise UserError(f"{path}/{error}; restore the file or run preprocess again") from error
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror}); check the disk") from error


_REMEDY = "give a directory that `preprocess` has written"
_RAW_TEXT = "raw text, no dataset; give the output of megatron-polar preprocess"


def _check_place(path: Path) -> None:
    """Refuse a path that was mistaken for a dataset, and say what is there instead."""
    if path.is_file() and path.name.endswith(INPUT_SUFFIXES):
        raise UserError(f"{path}: {_RAW_TEXT}")
    if not path.is_dir():
        if path.exists():
            raise UserError(f"{path}: not a directory; check the path")
        raise UserError(f"{path}: no such directory; check the path, or make it with megatron-polar preprocess")
    if any(os.path.lexists(path / name) for name in (MANIFEST, TOKENS, INDEX, WORK)):
        return  # a dataset, or what is left of one
    inside = sorted(str(entry.parent) for entry in path.glob(f"*/{TOKENS}"))
    if (path / "checkpoints").is_dir() or (path / "status.json").is_file():
        problem = f"a run directory of `train`, no dataset; {_REMEDY}"
    elif inside:
        problem = f"no dataset itself, but holds some; give {', '.join(inside[:4])}{', ...' if inside[4:] else ''}"
    elif any(entry.name.endswith(INPUT_SUFFIXES) for entry in path.iterdir()):
        problem = _RAW_TEXT
    else:
        problem = f"no dataset ({MANIFEST} is missing); {_REMEDY}"
    raise UserError(f"{path}: {problem}")


class Corpus:
    """A dataset directory made by `preprocess`.

    Opening checks the manifest, the names and sizes of all files and the whole index, not the tokens: that is
    `verify_tokens`, which several ranks can share, and `verify_hashes`. Raises UserError for whatever does not fit.
    Can be pickled; each process opens the files itself.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        with _refusing_damage(self.path):
            _check_place(self.path)
            self.manifest = read_dataset_manifest(self.path)
            check_dataset(self.path, self.manifest)
        self.policies: tuple[str, ...] = tuple(self.manifest["policies"])
        self._length: int = self.manifest["invariants"]["documents"]
        self._dataset: Any = None

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_dataset": None}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what training depends on: tokens, index, policies, tokenizer; not the inputs' names."""
        return fingerprint_of(self.manifest)

    @property
    def wrapper(self) -> str:
        """What joins prompt and answer in all documents; "" where they differ, and where an older `preprocess` did not
        write it down."""
        found = self.manifest.get("wrappers", ())
        return found[0] if len(found) == 1 else ""

    @property
    def control(self) -> ControlTokens:
        """The control tokens that the halves were made for."""
        names = ("bos_id", "separator_id", "reward_id", "pad_id")
        return ControlTokens(**{name: self.manifest["tokenizer"].get(name) for name in names})

    def document(self, index: int) -> StoredDocument:
        """Read document `index` (0 <= index < len)."""
        if not 0 <= index < self._length:
            raise IndexError(f"document {index} of {self._length}")
        dataset = self._open()
        first, last = (int(bound) for bound in dataset.document_indices[index : index + 2])
        # In one piece, as sequences lie behind each other (storage.py has checked that): dataset[first:last] would cut
        # it slowly. A copy: mcore unmaps the file when the dataset goes, and a view that outlives it crashes.
        ends = np.cumsum(dataset.sequence_lengths[first:last], dtype=np.int64).tolist()
        block = dataset.get(first, length=ends[-1]).copy()
        header, *sequences = (block[start:end] for start, end in zip([0, *ends], ends, strict=False))
        fields, policy_ids = header[:HEADER_FIELDS].tolist(), header[HEADER_FIELDS:]
        kind, wrapper, prompt_length = fields if len(fields) == HEADER_FIELDS else (-1, -1, -1)
        num_references = int(kind == KINDS.index("preference"))
        if kind == KINDS.index("references"):
            num_references = int((policy_ids == REFERENCE).sum())
            policy_ids = np.where(np.arange(len(policy_ids)) < num_references, -1, policy_ids)
        if (
            not 0 < len(sequences) == len(policy_ids)
            or not 0 <= kind < len(KINDS)
            or not 0 <= wrapper < len(WRAPPERS)
            or prompt_length < 0
            or (kind == KINDS.index("references") and not 1 < num_references < len(sequences))
            or not -1 <= policy_ids.min() <= policy_ids.max() < len(self.policies)
            or not self._ids_fit(block[ends[0] :])
        ):
            raise UserError(f"{self.path / TOKENS}: document {index} is damaged; run preprocess again")
        halves = tuple(
            Half(ids=ids, prompt_length=min(prompt_length, len(ids)), response_tokens_cut=0) for ids in sequences
        )
        return StoredDocument(
            kind="preference" if num_references else "trajectories",
            wrapper=WRAPPERS[wrapper],
            policy_ids=policy_ids,
            halves=halves,
            num_references=num_references,
        )

    def _ids_fit(self, ids: np.ndarray) -> bool:
        return len(ids) == 0 or (ids.min() >= 0 and ids.max() < self.manifest["tokenizer"]["vocab_size"])

    def _open(self) -> Any:
        if self._dataset is None:
            # Imported here: it takes torch, which neither preprocess nor a look at the manifest needs.
            from megatron.core.datasets.indexed_dataset import IndexedDataset

            self._dataset = IndexedDataset(str(self.path / "corpus"))
        return self._dataset

    def check_tokenizer(self, tokenizer: Tokenizer, *, origin: Path | str) -> None:
        """Raise UserError when the dataset was made with another tokenizer than this one, which is from `origin`."""
        made_with = self.manifest["tokenizer"]["fingerprint"]
        if made_with != tokenizer.fingerprint:
            raise UserError(
                f"{self.path}: made with tokenizer {made_with[:12]}, but that of this run is "
                f"{tokenizer.fingerprint[:12]} ({origin}); use {self.path / 'tokenizer'} for all datasets, or "
                f"run preprocess again with {origin}"
            )
        if self.control != tokenizer.control or self.manifest["tokenizer"]["vocab_size"] != tokenizer.vocab_size:
            raise UserError(f"{self.path}/manifest.json: describes another tokenizer than it names; preprocess again")

    def verify_tokens(self, part: int = 0, of: int = 1, *, after_each: Callable[[], None] = lambda: None) -> int:
        """Compare every `of`-th block of the tokens with its hash, and all other files too where `part` is 0.

        `of` ranks that each call it with their number check all of the dataset once. Returns the bytes read. Raises
        UserError with the file, the block and both hashes.
        """
        with _refusing_damage(self.path):
            return check_content(self.path, self.manifest, part=part, of=of, after_each=after_each)

    def verify_hashes(self) -> None:
        """Compare the SHA-256 of every file with the manifest, then read every document and count what the manifest
        counts; raises UserError naming the first that differs."""
        files = self.manifest["files"]
        with _refusing_damage(self.path):
            for name in log.progress(sorted(files), "verify", unit="files"):
                check_hash(self.path, name, files[name])
        self._open()  # before the documents' clock starts: it imports torch
        found: Counter = Counter()
        for index in log.progress(range(len(self)), "verify", unit="documents"):
            document = self.document(index)
            found["trajectory_groups" if document.kind == KINDS[0] else "preferences"] += 1
            found["halves"] += len(document.halves)
            found["tokens"] += sum(len(half.ids) for half in document.halves)
        for name, count in found.items():
            if count != self.manifest["counts"][name]:
                raise UserError(
                    f"{self.path / TOKENS}: has {count} {name}, the manifest {self.manifest['counts'][name]}; run "
                    "preprocess again"
                )
