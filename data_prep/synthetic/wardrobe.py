"""What an identity fixes: body, hair, clothes with their colours and patterns, bag.

Colours come from a short palette on purpose: many people share them, and are told apart by what is worn where, its cut
and its pattern.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

Colour = tuple[int, int, int]

SKINS: tuple[Colour, ...] = ((244, 212, 188), (226, 182, 148), (198, 146, 108), (146, 98, 66), (96, 62, 44))
HAIRS: tuple[Colour, ...] = ((24, 20, 20), (62, 40, 26), (122, 82, 44), (196, 162, 96), (150, 148, 148), (130, 46, 30))
CLOTHES: tuple[Colour, ...] = (
    (30, 30, 34),
    (226, 224, 220),
    (124, 126, 130),
    (34, 46, 92),
    (176, 40, 42),
    (46, 108, 62),
    (60, 112, 188),
    (190, 162, 118),
    (212, 176, 48),
    (112, 60, 126),
)
# Listed twice what is seen twice as often.
PATTERNS = ("plain", "plain", "hoops", "stripes", "checks", "logo", "halves", "sash", "back", "open")
UPPERS = ("tee", "sweater", "coat", "vest")
LOWERS = ("trousers", "trousers", "shorts", "skirt")
HAIRSTYLES = ("short", "short", "long", "bald", "cap")
BAGS = ("none", "none", "backpack", "shoulder", "hand")


@dataclasses.dataclass(frozen=True)
class Person:
    """One identity; lengths relative to an average person's."""

    skin: Colour
    hair: Colour
    hairstyle: str
    hat: Colour
    stature: float
    girth: float
    shoulders: float
    upper: str
    upper_colour: Colour
    second_colour: Colour
    pattern: str
    repeats: int
    lower: str
    lower_colour: Colour
    side_stripe: bool
    shoes: Colour
    bag: str
    bag_colour: Colour


def draw_person(rng: np.random.RandomState) -> Person:
    """A person by chance."""

    def one(options: tuple[str, ...]) -> str:
        return options[rng.randint(len(options))]

    def tone(palette: tuple[Colour, ...]) -> Colour:
        red, green, blue = palette[rng.randint(len(palette))]
        shift = rng.randint(-8, 9, 3)
        return _clip(red + shift[0]), _clip(green + shift[1]), _clip(blue + shift[2])

    upper_colour = tone(CLOTHES)
    second_colour = tone(CLOTHES)
    while sum(abs(a - b) for a, b in zip(upper_colour, second_colour, strict=True)) < 120:
        second_colour = tone(CLOTHES)  # else the pattern would not be seen
    return Person(
        skin=tone(SKINS),
        hair=tone(HAIRS),
        hairstyle=one(HAIRSTYLES),
        hat=tone(CLOTHES),
        stature=rng.uniform(0.9, 1.05),
        girth=rng.uniform(0.95, 1.45),
        shoulders=rng.uniform(1.0, 1.3),
        upper=one(UPPERS),
        upper_colour=upper_colour,
        second_colour=second_colour,
        pattern=one(PATTERNS),
        repeats=rng.randint(3, 7),
        lower=one(LOWERS),
        lower_colour=tone(CLOTHES),
        side_stripe=bool(rng.randint(4) == 0),
        shoes=tone(CLOTHES),
        bag=one(BAGS),
        bag_colour=tone(CLOTHES),
    )


def shade(colour: Colour, factor: float) -> Colour:
    """The colour in less (or more) light."""
    red, green, blue = colour
    return _clip(red * factor), _clip(green * factor), _clip(blue * factor)


def fabric(
    person: Person, across: Float32[np.ndarray, " width"], height: int, heading: float, light: float
) -> UInt8[np.ndarray, "height width 3"]:
    """The upper garment as seen from one side, RGB, unrolled from a cylinder.

    Args:
      person: who wears it.
      across: position of each column, -1 and 1 at the outline of the body.
      height: in pixels, from the neck to the hem.
      heading: of the person in radians, see `figure.Pose`.
      light: where it comes from, from -1 (left) to 1 (right).
    """
    flat = np.clip(across, -1, 1)
    # Around the body, 0 at the chest; a column's place on the cylinder minus how far the body is turned.
    around = np.arcsin(flat) - np.float32(heading)
    around = ((around + np.pi) % (2 * np.pi) - np.pi)[None, :]
    down = (np.arange(height, dtype=np.float32) / max(height - 1, 1))[:, None]
    second = np.broadcast_to(_pattern(person, around, down), (height, len(across)))
    colours = np.array([person.upper_colour, person.second_colour], np.float32)
    lit = 0.74 + 0.26 * np.sqrt(1 - np.square(np.clip(flat - 0.3 * light, -1, 1)))
    return np.clip(colours[second.astype(np.intp)] * lit[None, :, None], 0, 255).astype(np.uint8)


def _pattern(person: Person, around: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Where the second colour is, bool broadcasting to [H, W]; `around` radians [1, W], `down` 0 to 1 [H, 1]."""
    repeats = person.repeats
    hoops = (down * repeats) % 1 < 0.42
    stripes = (around / np.pi * (repeats + 1)) % 1 < 0.4
    match person.pattern:
        case "hoops":
            return hoops
        case "stripes":
            return stripes
        case "checks":
            return hoops ^ stripes
        case "logo":
            return (np.abs(around) < 0.6) & (np.abs(down - 0.33) < 0.13)
        case "back":
            return (np.abs(around) > np.pi - 0.7) & (np.abs(down - 0.4) < 0.22)
        case "halves":
            return down > 0.25 + 0.1 * (repeats % 4)
        case "sash":
            return np.abs(np.sin(around) * 0.5 + 0.5 - down) < 0.11
        case "open":
            return np.abs(around) < 0.38
    return np.zeros((1, 1), bool)


def _clip(value: float) -> int:
    return int(min(max(value, 0), 255))
