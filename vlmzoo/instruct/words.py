"""Names of objects in English text: COCO's categories with the words that people use for them, numbers and plurals."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# After Lu et al., Neural Baby Talk (2018) and Rohrbach et al., Object Hallucination in Image Captioning (2018), who
# map words to COCO's categories for the same purpose; chosen anew and shorter: words with one plain meaning.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "person": (
        *("man", "woman", "boy", "girl", "child", "kid", "baby", "toddler", "lady", "gentleman", "guy"),
        *("player", "skier", "snowboarder", "surfer", "skateboarder", "rider", "biker", "cyclist", "pedestrian"),
        *("passenger", "driver", "chef", "batter", "pitcher", "catcher", "umpire", "officer"),
    ),
    "bicycle": ("bike", "tricycle"),
    "car": ("taxi", "cab", "sedan", "suv", "minivan"),
    "motorcycle": ("motorbike", "moped", "scooter"),
    "airplane": ("plane", "jet", "aircraft", "jetliner", "airliner"),
    "bus": ("minibus", "trolleybus"),
    "train": ("locomotive", "tram"),
    "truck": ("lorry", "pickup"),
    "boat": ("ship", "sailboat", "canoe", "kayak", "ferry", "yacht"),
    "traffic light": ("stoplight", "traffic signal"),
    "fire hydrant": ("hydrant",),
    "stop sign": (),
    "parking meter": (),
    "bench": (),
    "bird": ("duck", "seagull", "pigeon", "parrot", "owl", "goose", "swan", "gull", "eagle"),
    "cat": ("kitten", "kitty"),
    "dog": ("puppy", "poodle", "terrier", "retriever", "bulldog"),
    "horse": ("pony", "foal", "stallion"),
    "sheep": ("lamb", "ewe"),
    "cow": ("cattle", "bull", "calf", "ox"),
    "elephant": (),
    "bear": (),
    "zebra": (),
    "giraffe": (),
    "backpack": ("rucksack",),
    "umbrella": ("parasol",),
    "handbag": ("purse",),
    "tie": ("necktie", "bow tie"),
    "suitcase": ("luggage",),
    "frisbee": (),
    "skis": ("ski",),
    "snowboard": (),
    "sports ball": ("baseball", "basketball", "football", "tennis ball", "soccer ball"),
    "kite": (),
    "baseball bat": (),
    "baseball glove": ("catcher's mitt",),
    "skateboard": (),
    "surfboard": (),
    "tennis racket": ("tennis racquet", "racket", "racquet"),
    "bottle": (),
    "wine glass": ("wineglass",),
    "cup": ("mug",),
    "fork": (),
    "knife": (),
    "spoon": (),
    "bowl": (),
    "banana": (),
    "apple": (),
    "sandwich": ("burger", "hamburger"),
    "orange": (),
    "broccoli": (),
    "carrot": (),
    "hot dog": ("hotdog",),
    "pizza": (),
    "donut": ("doughnut",),
    "cake": ("cupcake",),
    "chair": ("armchair", "stool"),
    "couch": ("sofa",),
    "potted plant": ("houseplant",),
    "bed": (),
    "dining table": (),
    "toilet": (),
    "tv": ("television",),
    "laptop": (),
    "mouse": ("computer mouse",),
    "remote": ("remote control",),
    "keyboard": (),
    "cell phone": ("cellphone", "mobile phone", "smartphone"),
    "microwave": (),
    "oven": (),
    "toaster": (),
    "sink": (),
    "refrigerator": ("fridge",),
    "book": (),
    "clock": (),
    "vase": (),
    "scissors": (),
    "teddy bear": ("stuffed bear",),
    "hair drier": ("hair dryer", "hairdryer"),
    "toothbrush": (),
}
# Each of these is also a verb or a colour: an object only behind one of these words.
AMBIGUOUS = frozenset(("bear", "book", "cake", "orange", "sink", "tie", "train", "remote", "ski", "bowl", "fork"))
DETERMINERS = frozenset(("a", "an", "the", "another", "this", "that", "his", "her", "their", "its", "no", *NUMBERS[1:]))
IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "gentleman": "gentlemen",
    "child": "children",
    "knife": "knives",
    "mouse": "mice",
    "computer mouse": "computer mice",
    "calf": "calves",
    "ox": "oxen",
    "goose": "geese",
    **{word: word for word in ("sheep", "cattle", "broccoli", "luggage", "skis", "scissors", "aircraft")},
}
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def plural(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    head, space, last = noun.rpartition(" ")
    if space:
        return f"{head} {plural(last)}"
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def a(noun: str) -> str:
    """The noun with its article; none where it has no singular."""
    if plural(noun) == noun and noun != "sheep":
        return noun
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def some(count: int, noun: str) -> str:
    """`a dog`, `two dogs`, `no dogs`."""
    return a(noun) if count == 1 else f"{number(count)} {plural(noun)}"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


@dataclass(frozen=True, slots=True)
class Mention:
    """Words that name an object, at `start` up to `end` of a text's words."""

    category: str
    start: int
    end: int
    plural: bool
    whole: bool  # the category's own name: people are all persons, men some of them


class Vocabulary:
    """Which words name which category: COCO's and those of a data set, which go first."""

    def __init__(self, categories: Iterable[str]) -> None:
        self._names: dict[tuple[str, ...], tuple[str, bool, bool]] = {}
        own = {category.lower(): category for category in categories}
        for noun in (*SYNONYMS, *own):
            category = own.get(noun, noun)
            for name in (*SYNONYMS.get(noun, ()), noun):
                self._names[tuple(words(plural(name)))] = category, True, name == noun
                self._names[tuple(words(name))] = category, plural(name) == name, name == noun
        self._names.pop((), None)
        self._longest: dict[str, int] = {}  # by a name's first word: in words
        for name in self._names:
            self._longest[name[0]] = max(len(name), self._longest.get(name[0], 0))

    def mentions(self, told: list[str]) -> list[Mention]:
        """The objects that a text's words name, the longest name first: a hot dog is no dog."""
        found, at = [], 0
        while at < len(told):
            for length in range(min(self._longest.get(told[at], 0), len(told) - at), 0, -1):
                named = self._names.get(tuple(told[at : at + length]))
                if named is not None and self._is_object(told, at, length):
                    category, many, whole = named
                    found.append(Mention(category, at, at + length, many, whole))
                    at += length
                    break
            else:
                at += 1
        return found

    def _is_object(self, told: list[str], at: int, length: int) -> bool:
        if length > 1 or told[at] not in AMBIGUOUS:
            return True
        return at > 0 and told[at - 1] in DETERMINERS and tuple(told[at + 1 : at + 2]) not in self._names
