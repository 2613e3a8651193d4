"""(seed, epoch, index) → Comparison: which trajectories are compared at which place of an epoch.

Everything here is a pure function of the seed, the index and the data, and with `data.contrast: by_difficulty` of a
table of how hard pairs of policies are (curriculum.py): no state, no files, the same on every rank, in every layout.
An index counts comparisons over all epochs: epoch = index // comparisons per epoch.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_polar.config.schema import CurriculumSection, DatasetSource
from megatron_polar.data.corpus import Corpus, StoredDocument
from megatron_polar.data.curriculum import DifficultyTable, draw_hard_contrast
from megatron_polar.data.template import ControlTokens, TokenizedComparison, assemble_comparison
from megatron_polar.errors import UserError

_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 6


def _mix64(value: int) -> int:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def permute(position: int, *, size: int, key: int) -> int:
    """Where `position` goes in the `key`-th pseudo-random permutation of range(size), in constant memory.

    A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside the range;
    half a billion comparisons need no table.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    round_keys = [_mix64(key + index) for index in range(_FEISTEL_ROUNDS)]
    while True:
        left, right = position >> half_bits, position & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix64(right ^ round_key) & mask)
        position = (left << half_bits) | right
        if position < size:
            return position


class ComparisonDataset:
    """Comparisons drawn from one or several corpora, in a shuffled order that repeats in no two epochs.

    An epoch has as many comparisons as all corpora have documents; a corpus contributes its share by weight (by size
    where no weights are given), walking through its documents in an order of its own, so that over epochs every
    document is used equally often. Trajectory documents give reference and candidate 1 from one policy and candidates
    2..K from others (paper eq. 7); preferences give their candidates in ranked order (eq. 8). Of several references
    each pass over the documents takes another one, all in turn. With a `curriculum` the policies of a trajectory
    document are drawn by difficulty, else uniformly; which document an index means, and how preferences are drawn, does
    not depend on it.

    `policies` are the names in all corpora, sorted: a policy has one number wherever it appears.
    """

    def __init__(
        self,
        sources: Sequence[DatasetSource],
        *,
        seed: int,
        candidates_per_comparison: int,
        max_sequence_length: int,
        curriculum: CurriculumSection | None = None,
    ):
        self.corpora = [Corpus(source.path) for source in sources]
        self.seed = seed
        self.candidates_per_comparison = candidates_per_comparison
        self.max_sequence_length = max_sequence_length
        self.control = _shared_control_tokens(self.corpora, sources)
        self._shares = _shares([len(corpus) for corpus in self.corpora], [source.weight for source in sources])
        self._ends = np.cumsum(self._shares)
        self.curriculum = curriculum
        self.policies = tuple(sorted({name for corpus in self.corpora for name in corpus.policies}))
        numbers = {name: number for number, name in enumerate(self.policies)}
        self._numbers = [np.array([numbers[name] for name in c.policies], dtype=np.int64) for c in self.corpora]

    def __len__(self) -> int:
        """Comparisons per epoch."""
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything that decides which comparison an index means."""
        parts = [corpus.fingerprint for corpus in self.corpora] + [str(share) for share in self._shares]
        parts += [str(self.seed), str(self.candidates_per_comparison), str(self.max_sequence_length)]
        if self.curriculum is not None:
            names = ("interval", "half_life", "floor", "temperature", "prior_comparisons")
            parts += ["by_difficulty", *(f"{name}={getattr(self.curriculum, name)!r}" for name in names)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def wrapper(self) -> str:
        """What joins prompt and answer in all of the data; "" where that differs or is not known."""
        found = {corpus.wrapper for corpus in self.corpora}
        return found.pop() if len(found) == 1 else ""

    def locate(self, index: int) -> tuple[int, int]:
        """The corpus, and the running number of the draw from it, that comparison `index` means."""
        epoch, position = divmod(index, len(self))
        place = permute(position, size=len(self), key=_mix64(_mix64(self.seed) + epoch))
        source = int(np.searchsorted(self._ends, place, side="right"))
        start = int(self._ends[source] - self._shares[source])
        return source, epoch * int(self._shares[source]) + place - start

    def comparison(self, index: int, table: DifficultyTable | None = None) -> TokenizedComparison:
        """Draw comparison `index` (any non-negative integer; epochs follow each other); with a curriculum, by the
        table of the step that it belongs to."""
        if (table is None) != (self.curriculum is None):
            raise ValueError(
                "comparisons are drawn with a table of difficulties if, and only if, there is a curriculum"
            )
        source, draw = self.locate(index)
        corpus = self.corpora[source]
        cycle, position = divmod(draw, len(corpus))
        key = _mix64(_mix64(_mix64(self.seed) + source) + cycle)
        document = permute(position, size=len(corpus), key=key)
        stored = corpus.document(document)
        if not _has_contrast(stored):
            raise UserError(
                f"{corpus.path}: document {document} has nothing to compare (one policy with two trajectories and "
                f"another, or two ranked answers); preprocess did not write it"
            )
        generator = np.random.default_rng([self.seed, source, cycle, document])
        count, policies = self.candidates_per_comparison, ()
        if stored.kind == "trajectories":
            ids = self._numbers[source][stored.policy_ids]
            if table is None:
                reference, candidates, levels = _draw_contrast(stored, count=count, generator=generator)
            else:
                reference, candidates, levels = draw_hard_contrast(ids, table=table, count=count, generator=generator)
            policies = tuple(ids[[reference, *candidates]].tolist())
        else:
            candidates, levels = _draw_ranking(stored, count=count, generator=generator)
            first = _mix64(_mix64(_mix64(self.seed) + source) + document)  # not the same one for all documents
            reference = (first + cycle) % stored.num_references
        assembled = assemble_comparison(
            stored.halves[reference],
            [stored.halves[i] for i in candidates],
            levels=levels,
            control=self.control,
            max_length=self.max_sequence_length,
        )
        return dataclasses.replace(assembled, policies=policies)

    def share_with_a_choice(self, *, num_documents: int = 256) -> float:
        """Of the first trajectory documents of each corpus, the share that offers more policies than a comparison
        needs, so that a curriculum can choose."""
        found = []
        for corpus in self.corpora:
            for stored in map(corpus.document, range(min(num_documents, len(corpus)))):
                if stored.kind == "trajectories":
                    sizes = np.unique(stored.policy_ids, return_counts=True)[1]
                    found.append((sizes >= 2).sum() > 1 or len(sizes) > self.candidates_per_comparison)
        return float(np.mean(found)) if found else 0.0


def _shares(sizes: Sequence[int], weights: Sequence[float | None]) -> np.ndarray:
    """Comparisons per epoch of each corpus: by weight, with the largest remainders rounded up, at least one each."""
    if all(weight is None for weight in weights):
        return np.array(sizes, dtype=np.int64)
    total = sum(sizes)
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    for position in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[position] += 1
    return np.maximum(shares, 1)


def _shared_control_tokens(corpora: Sequence[Corpus], sources: Sequence[DatasetSource]) -> ControlTokens:
    first = corpora[0].manifest["tokenizer"]
    for corpus, source in zip(corpora, sources, strict=True):
        if not len(corpus):
            raise UserError(f"{source.path}: holds no documents; preprocess something that has comparisons in it")
        other = corpus.manifest["tokenizer"]
        if other["fingerprint"] != first["fingerprint"]:
            raise UserError(
                f"{source.path}: made with another tokenizer ({other['fingerprint'][:12]}) than {sources[0].path} "
                f"({first['fingerprint'][:12]}); preprocess one of them again with the other's tokenizer"
            )
    return corpora[0].control


def _has_contrast(document: StoredDocument) -> bool:
    if document.kind == "preference":
        return len(document.halves) - document.num_references > 1
    ids = document.policy_ids.tolist()
    return 1 < len(set(ids)) < len(ids)


def _draw_contrast(
    document: StoredDocument, *, count: int, generator: np.random.Generator
) -> tuple[int, list[int], tuple[int, ...]]:
    """Reference and candidate 1 from one policy, the others from as many other policies as there are."""
    ids = document.policy_ids.tolist()  # a handful: numpy would take longer
    sizes = Counter(ids)
    anchor = generator.choice([policy for policy in sorted(sizes) if sizes[policy] >= 2])
    reference, same = generator.permutation([i for i, policy in enumerate(ids) if policy == anchor])[:2].tolist()
    others = generator.permutation([i for i, policy in enumerate(ids) if policy != anchor]).tolist()
    # The n-th trajectory of every policy comes before anyone's (n+1)-th: policies stay as different as possible.
    seen: Counter = Counter()
    turns = {}
    for trajectory in others:
        turns[trajectory] = seen[ids[trajectory]]
        seen[ids[trajectory]] += 1
    chosen = sorted(others, key=turns.__getitem__)[: count - 1]
    return reference, [same, *chosen], (0,) + (1,) * len(chosen)


def _draw_ranking(
    document: StoredDocument, *, count: int, generator: np.random.Generator
) -> tuple[list[int], tuple[int, ...]]:
    """The stored ranking and its levels; of a longer one, `count` candidates in their order."""
    candidates = np.arange(document.num_references, len(document.halves))
    if len(candidates) > count:
        candidates = np.sort(generator.choice(candidates, size=count, replace=False))
    return [int(c) for c in candidates], tuple(range(len(candidates)))
