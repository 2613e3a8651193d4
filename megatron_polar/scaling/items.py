"""Losses of single held-out items, from the rewards that `evaluate` writes."""

import hashlib
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import orjson

from megatron_polar.errors import UserError


@dataclass(frozen=True)
class Items:
    """Bradley-Terry losses of held-out items: `losses` [items] are sums over the ordered pairs of an item, `pairs`
    [items] their number; `identity` is a hash of suite, texts, references and levels: losses of equal ones compare."""

    losses: np.ndarray
    pairs: np.ndarray
    suite: str
    identity: str

    @property
    def loss(self) -> float:
        """Mean over all pairs."""
        return float(self.losses.sum() / self.pairs.sum())


def read_items(directory: Path) -> Items:
    """Read `summary.json` and `rewards.jsonl` of an evaluation. Raises UserError where they are not that."""
    losses, pairs, identity = [], [], hashlib.sha256()
    try:
        summary = orjson.loads((directory / "summary.json").read_bytes())
        suite = str(summary["suite"])
        if summary["swap_check"] != "passed":
            raise UserError(f"{directory}: its label-swap check says {summary['swap_check']}; evaluate again")
        of_items = [summary.get(name) for name in ("items_sha256", "reference_scheme", "num_references")]
        identity.update(orjson.dumps([suite, *of_items]))
        has_no_texts = of_items[0] is None  # an evaluation by an older version
        for line in (directory / "rewards.jsonl").read_bytes().splitlines():
            item = orjson.loads(line)
            rewards, levels = np.asarray(item["rewards"], dtype=np.float64), item["levels"]
            if not np.isfinite(rewards).all():
                raise UserError(f"{directory}/rewards.jsonl: a reward of {item['identifier']} is no number")
            name = item["identifier"] if has_no_texts else ""  # of equal texts a file may have any name
            identity.update(orjson.dumps([name, levels]))
            ordered = [(i, j) for i, j in permutations(range(len(levels)), 2) if levels[i] < levels[j]]
            if not ordered:
                continue
            better, worse = np.array(ordered).T
            losses.append(float(np.logaddexp(0.0, rewards[worse] - rewards[better]).sum()))
            pairs.append(len(ordered))
    except OSError as error:
        raise UserError(
            f"{error.filename or directory}: {error.strerror}; run `megatron-polar evaluate` with --output {directory}"
        ) from None
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"{directory}: its files are not what `evaluate` writes ({reason}); evaluate again") from None
    if not losses:
        raise UserError(f"{directory}/rewards.jsonl: holds no item with an order; evaluate again")
    return Items(np.array(losses), np.array(pairs), suite, identity.hexdigest())
