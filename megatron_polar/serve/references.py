"""Items with several references, for engines that score a text against one: an item for each, and the way back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_polar.data.references import distinct_references, split_references
from megatron_polar.data.template import prompt_text
from megatron_polar.serve.wire import RewardError, RewardItem


@dataclass(frozen=True)
class SpreadItems:
    """Items of one reference each, in order. `places[i]` is the item that single i comes from, `numbers[i]` which of
    its distinct references it has, None where the item has one anyway. `duplicates` references were dropped."""

    singles: tuple[RewardItem, ...]
    places: tuple[int, ...]
    numbers: tuple[int | None, ...]
    duplicates: int

    def per_item(self, rewards: Sequence[float]) -> list[list[float]]:
        """Rewards of the singles as [item][reference]."""
        found: list[list[float]] = [[] for _ in range(self.places[-1] + 1)] if self.places else []
        for place, reward in zip(self.places, rewards, strict=True):
            found[place].append(reward)
        return found

    def in_items(self, error: RewardError) -> RewardError:
        """An error about singles, told in the places of the items."""
        numbers = {self.numbers[index] for index in error.indices}
        (number,) = numbers if len(numbers) == 1 else (None,)
        where = "" if number is None else f"against its reference {number}: "
        return RewardError(tuple(dict.fromkeys(self.places[index] for index in error.indices)), where + error.reason)


def spread_references(items: Sequence[RewardItem]) -> SpreadItems:
    """An item for each distinct reference of each item. Raises RewardError for an item with an empty list of them."""
    singles, places, numbers, duplicates = [], [], [], 0
    for place, item in enumerate(items):
        several = split_references(item.reference)
        if several is None:
            singles.append(item)
            places.append(place)
            numbers.append(None)
            continue
        if not several:
            raise RewardError([place], "its references are an empty list; give at least one")
        for reference in several:
            if isinstance(reference, Mapping):
                raise RewardError([place], "its list of references has a message in it; give texts, or message lists")
        try:
            found = distinct_references([prompt_text(reference) for reference in several])
        except TypeError as error:
            raise RewardError([place], f"one of its references is no text: {error}") from error
        duplicates += found.duplicates
        for number, text in enumerate(found.texts):
            singles.append(replace(item, reference=text))
            places.append(place)
            numbers.append(number if len(found.texts) > 1 else None)
    return SpreadItems(tuple(singles), tuple(places), tuple(numbers), duplicates)
