"""The classes of a trained model: names, the data set's ids, colours."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detectron2.data.catalog import Metadata

from gn_practical.inference.drawing import with_colors
from gn_practical.weights.describe import class_colors, class_ids, class_names
from gn_practical.weights.description import Description

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """Classes by the numbers that a model predicts, those of things and of stuff each from 0.

    Attributes:
        things: names; empty where they are not known, and classes are called by their numbers.
        stuff: names; the first may be "things", all of them, as Detectron2 has it.
        thing_ids: the data set's ids of the things; None where they are not known.
        stuff_ids: likewise.
        colors: of things and stuff, (R, G, B).
    """

    things: tuple[str, ...] = ()
    stuff: tuple[str, ...] = ()
    thing_ids: tuple[Any, ...] | None = None
    stuff_ids: tuple[Any, ...] | None = None
    colors: tuple[tuple[Color, ...], tuple[Color, ...]] = ((), ())

    @property
    def has_ids(self) -> bool:
        """Whether the data set's ids are known of all classes that have names."""
        things, stuff = (self.thing_ids or ()), (self.stuff_ids or ())
        known = bool(self.things or self.stuff)
        return known and len(things) == len(self.things) and len(stuff) == len(self.stuff)

    def name(self, number: int, thing: bool = True) -> str:
        """Return a class's name, or its number in words.

        Example:
            >>> Classes(things=("cat",)).name(0), Classes().name(7), Classes().name(7, thing=False)
            ('cat', 'class 7', 'stuff 7')
        """
        names = self.things if thing else self.stuff
        if number < len(names):
            return names[number]
        return f"{'class' if thing else 'stuff'} {number}"

    def color(self, number: int, thing: bool = True) -> Color:
        """Return a class's colour."""
        colors = self.colors[0 if thing else 1] or ((128, 128, 128),)
        return colors[number % len(colors)]

    def dataset_id(self, number: int, thing: bool = True) -> Any:
        """Return the data set's id of a class.

        Where that is not known: its number, and of stuff beside things the number after theirs.

        Example:
            >>> Classes(("cat", "dog"), ("things", "sky")).dataset_id(1, thing=False)
            3
        """
        ids = self.thing_ids if thing else self.stuff_ids
        if self.has_ids and number < len(ids):
            return ids[number]
        return number if thing else len(self.things) + number

    def categories(self) -> list[dict[str, Any]]:
        """Return the classes as the ``categories`` of COCO's files."""
        return [
            {"id": self.dataset_id(number, thing), "name": name, "isthing": int(thing)}
            for thing, number, name in self._all()
        ]

    def _all(self) -> list[tuple[bool, int, str]]:
        """Return (thing, number, name) of all classes but "things" among the stuff."""
        stuff = [(False, number, name) for number, name in enumerate(self.stuff)]
        if self.things and stuff and self.stuff[0] == "things":
            del stuff[0]
        return [*((True, number, name) for number, name in enumerate(self.things)), *stuff]

    def chosen(self, names: Iterable[str]) -> "Chosen":
        """Return which classes are asked for.

        Args:
            names: of classes, or their numbers where they have no names; a text that is none of
                them may be several, with commas between.

        Raises:
            ValueError: naming the first that is unknown, and those near to it.
        """
        known: dict[str, set[tuple[bool, int]]] = {}
        for thing, number, name in self._all():  # names of which one may be given twice
            known.setdefault(name, set()).add((thing, number))
        wanted = [
            part
            for name in names
            for part in ([name] if name in known else map(str.strip, name.split(",")))
        ]
        if not known:
            return Chosen(frozenset((True, _number(name)) for name in wanted))
        for name in wanted:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3) or list(known)[:10]
                raise ValueError(
                    f"classes must be among the model's {len(known)}, got {name!r}. "
                    f"Near to it: {', '.join(near)}."
                )
        return Chosen(frozenset().union(*(known[name] for name in wanted)))

    def with_ids_of(self, categories: Sequence[Mapping[str, Any]], path: str) -> "Classes":
        """Return the classes with the ids that a data set's json has for their names.

        Args:
            categories: those of the json.
            path: of the json, for the error.

        Raises:
            ValueError: if it lacks one of the classes.
        """
        ids = {category["name"]: category["id"] for category in categories}
        names = [name for _, _, name in self._all()]
        without = [name for name in names if name not in ids]
        if without or not names:
            what = repr(without[0]) if without else "none of the model's, which has no names"
            raise ValueError(
                f"a json of ids must have all classes of the model, got {path} without {what}. "
                "Give the json that the model was trained or validated with."
            )
        stuff = tuple(ids.get(name, 0) for name in self.stuff)
        things = tuple(ids[name] for name in self.things)
        return replace(self, thing_ids=things, stuff_ids=stuff)


@dataclass(frozen=True)
class Chosen:
    """Classes that are asked for: whether a thing, and its number."""

    classes: frozenset[tuple[bool, int]]

    def __contains__(self, item: tuple[bool, int]) -> bool:
        return item in self.classes


def classes_of(description: Description | None, datasets: Iterable[str] = ()) -> Classes:
    """Return the classes that a checkpoint describes, else those of a registered data set.

    Args:
        description: of the weights.
        datasets: names of data sets, which Detectron2's catalog may know.
    """
    datasets = list(datasets)
    described = description or Description()
    registered = class_names(datasets) or {}
    names = described.class_names or registered
    ids, colors = described.class_ids, described.class_colors
    if names == registered:
        ids, colors = ids or class_ids(datasets), colors or class_colors(datasets)
    kinds = ("thing", "stuff")
    metadata = Metadata(
        **{f"{kind}_classes": names.get(kind, []) for kind in kinds},
        **{f"{kind}_colors": (colors or {}).get(kind, []) for kind in kinds},
    )
    colored = with_colors(metadata)
    thing_ids, stuff_ids = ((ids or {}).get(kind) for kind in kinds)
    return Classes(
        tuple(names.get("thing", ())),
        tuple(names.get("stuff", ())),
        thing_ids and tuple(thing_ids),
        stuff_ids and tuple(stuff_ids),
        (_colors(colored.thing_colors), _colors(colored.stuff_colors)),
    )


def _colors(colors: Iterable[Iterable[float]]) -> tuple[Color, ...]:
    return tuple(tuple(int(channel) for channel in color) for color in colors)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(
            f"classes must be numbers for a model that knows no names, got {text!r}. Give their "
            "numbers, from 0."
        )
    return int(text)
