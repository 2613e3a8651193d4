"""A preprocessed dataset, opened and checked; `preprocess` writes one. The format is in docs/data.md."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_polar import log
from megatron_polar.data.preprocess import PreprocessReport, preprocess
from megatron_polar.data.storage import (
    FORMAT_VERSION,
    HEADER_FIELDS,
    KINDS,
    check_index,
    file_entry,
    read_manifest,
)
from megatron_polar.data.template import WRAPPERS, ControlTokens, Half
from megatron_polar.data.tokenizer import Tokenizer
from megatron_polar.errors import UserError

__all__ = ["Corpus", "PreprocessReport", "StoredDocument", "preprocess"]


@dataclass(frozen=True)
class StoredDocument:
    """One prompt: `kind` "trajectories" (halves in input order) or "preference" (reference, then best .. worst).

    `policy_ids` is int32 [number of halves], positions in the corpus' policies, -1 where unknown.
    """

    kind: str
    wrapper: str
    policy_ids: np.ndarray
    halves: tuple[Half, ...]


class Corpus:
    """A dataset directory made by `preprocess`.

    Opening checks the manifest's checksum, all file sizes and the whole index, not the hash of the tokens: that is
    `verify_hashes`. Raises UserError for whatever does not fit. Can be pickled; each process opens the files itself.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.policies: tuple[str, ...] = tuple(self.manifest["policies"])
        self._check_sizes()
        invariants = self.manifest["invariants"]
        self._length = invariants["documents"]
        check_index(
            self.path / "corpus.idx",
            num_sequences=invariants["sequences"],
            num_documents=self._length,
            num_tokens_bytes=self.manifest["files"]["corpus.bin"]["size"],
            xxh3_128=invariants["index_xxh3_128"],
        )
        self._dataset: Any = None

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_dataset": None}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what training depends on: tokens, index, policies, tokenizer; not the inputs' names."""
        files = [self.manifest["files"][name]["sha256"] for name in ("corpus.bin", "corpus.idx")]
        parts = [FORMAT_VERSION, files, self.manifest["policies"], self.manifest["tokenizer"]["fingerprint"]]
        return hashlib.sha256(orjson.dumps(parts)).hexdigest()

    @property
    def control(self) -> ControlTokens:
        """The control tokens that the halves were made for."""
        names = ("bos_id", "separator_id", "reward_id", "pad_id")
        return ControlTokens(**{name: self.manifest["tokenizer"][name] for name in names})

    def document(self, index: int) -> StoredDocument:
        """Read document `index` (0 <= index < len)."""
        if not 0 <= index < self._length:
            raise IndexError(f"document {index} of {self._length}")
        dataset = self._open()
        first, last = (int(bound) for bound in dataset.document_indices[index : index + 2])
        # Copies: mcore unmaps the file when the dataset goes, and a view that outlives it crashes the process.
        header, *sequences = (sequence.copy() for sequence in dataset[first:last])
        kind, wrapper, prompt_length = (int(value) for value in header[:HEADER_FIELDS])
        policy_ids = header[HEADER_FIELDS:]
        if (
            len(policy_ids) != len(sequences)
            or not 0 <= kind < len(KINDS)
            or not 0 <= wrapper < len(WRAPPERS)
            or not -1 <= policy_ids.min() <= policy_ids.max() < len(self.policies)
            or not all(self._ids_fit(sequence) for sequence in sequences)
        ):
            raise UserError(f"{self.path / 'corpus.bin'}: document {index} is damaged; run preprocess again")
        halves = tuple(
            Half(ids=ids, prompt_length=min(prompt_length, len(ids)), response_tokens_cut=0) for ids in sequences
        )
        return StoredDocument(kind=KINDS[kind], wrapper=WRAPPERS[wrapper], policy_ids=policy_ids, halves=halves)

    def _ids_fit(self, ids: np.ndarray) -> bool:
        return len(ids) == 0 or (ids.min() >= 0 and ids.max() < self.manifest["tokenizer"]["vocab_size"])

    def _open(self) -> Any:
        if self._dataset is None:
            # Imported here: it takes torch, which neither preprocess nor a look at the manifest needs.
            from megatron.core.datasets.indexed_dataset import IndexedDataset

            self._dataset = IndexedDataset(str(self.path / "corpus"))
        return self._dataset

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise UserError when the dataset was made with another tokenizer."""
        made_with = self.manifest["tokenizer"]["fingerprint"]
        if made_with != tokenizer.fingerprint:
            raise UserError(
                f"{self.path}: made with tokenizer {made_with[:12]}, but this one is {tokenizer.fingerprint[:12]}; use "
                f"{self.path / 'tokenizer'} or run preprocess again with this tokenizer"
            )

    def verify_hashes(self) -> None:
        """Read every file and compare its SHA-256 with the manifest; raises UserError naming the first that differs."""
        files = self.manifest["files"]
        for name in log.progress(sorted(files), "verify", unit="files"):
            found = file_entry(self.path / name)["sha256"]
            if found != files[name]["sha256"]:
                raise UserError(
                    f"{self.path / name}: SHA-256 is {found[:12]}..., the manifest has {files[name]['sha256'][:12]}"
                    "...; restore the file or run preprocess again"
                )

    def _check_sizes(self) -> None:
        for name, entry in self.manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{self.path / 'manifest.json'}: names {name!r}, outside the dataset; do not use it")
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file}: missing; restore the file or run preprocess again")
            size = file.stat().st_size
            if size != entry["size"]:
                word = "truncated" if size < entry["size"] else "too long"
                raise UserError(
                    f"{file}: {word}, {size} bytes where the manifest has {entry['size']}; restore the file or run "
                    "preprocess again"
                )
