"""A walking person, drawn from a skeleton in three dimensions.

Body frame: x to the person's left, y up, z forwards, in statures, origin on the ground between the feet. What a person
wears is fixed on the body, so every view shows the same person: a logo on the chest is not seen from behind, a backpack
hides the back of a shirt, stripes wrap around.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from data_prep.synthetic.wardrobe import Colour, Person, fabric, shade

_SHOULDER, _HIP, _NECK, _HEAD = 0.815, 0.50, 0.855, 0.93
_THIGH, _SHIN, _UPPER_ARM, _FOREARM = 0.235, 0.225, 0.155, 0.15
_HEM = {"tee": 0.47, "sweater": 0.455, "coat": 0.34, "vest": 0.475}

Vector = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Pose:
    """What an image adds to a person; angles in radians.

    Attributes:
      heading: 0 walks towards the camera, pi / 2 to the right of the image.
      pitch: of the camera, looking down.
      stride: amplitude of the legs.
      phase: within a step.
      elbow: bend of the arms.
      telephone: whether one hand is at the head.
    """

    heading: float
    pitch: float
    stride: float
    phase: float
    elbow: float
    telephone: bool


class Figure:
    """Draws one person on an image."""

    def __init__(
        self,
        canvas: Image.Image,
        person: Person,
        pose: Pose,
        foot: tuple[float, float],
        height: float,
        light: float,
    ):
        """Prepares to draw `person` in a pose on an RGB canvas.

        The point between the feet is at `foot` (x, y), a person of stature 1 is `height` high, both in pixels. `light`
        is the direction of the light, from -1 (left) to 1 (right).
        """
        self._canvas, self._pen = canvas, ImageDraw.Draw(canvas)
        self._person, self._pose, self._foot, self._light = person, pose, foot, light
        self._size = height * person.stature
        self._sin, self._cos = math.sin(pose.heading), math.cos(pose.heading)
        self._down, self._up = math.sin(pose.pitch), math.cos(pose.pitch)

    def draw(self) -> None:
        """Draws shadow and person, farthest parts first."""
        self._shadow()
        parts: list[tuple[float, Callable[[], None]]] = [(0.0, self._torso), (0.02, self._head)]
        for side in (-1, 1):
            parts += [self._leg(side), self._arm(side)]
        if self._person.hairstyle == "long":
            parts.append((0.021 - 0.05 * self._cos, self._long_hair))
        if self._person.bag == "backpack":
            parts.append((-0.09 * self._cos, self._backpack))
        for _, part in sorted(parts, key=lambda entry: entry[0]):
            part()

    def _project(self, point: Vector) -> Vector:
        """Position in pixels, and nearness to the camera in statures, of a point of the body."""
        x, y, z = point
        across, near = x * self._cos + z * self._sin, z * self._cos - x * self._sin
        return (
            self._foot[0] + across * self._size,
            self._foot[1] + (near * self._down - y * self._up) * self._size,
            near,
        )

    def _shadow(self) -> None:
        x, y = self._foot
        wide, high = 0.16 * self._size, 0.03 * self._size
        left, top = round(x - wide * (1 + 0.6 * self._light)), round(y - high)
        mask = Image.new("L", (max(round(2 * wide), 1), max(round(2 * high), 1)))
        ImageDraw.Draw(mask).ellipse((0, 0, mask.width - 1, mask.height - 1), fill=110)
        self._canvas.paste((14, 14, 18), (left, top), mask)

    def _limb(self, start: Vector, end: Vector, radii: tuple[float, float], colour: Colour) -> None:
        """A tapered limb, round at both ends, lighter where the light comes from."""
        (x0, y0, _), (x1, y1, _) = self._project(start), self._project(end)
        r0, r1 = radii[0] * self._size, radii[1] * self._size
        self._capsule(x0, y0, x1, y1, r0, r1, shade(colour, 0.78))
        shift = 0.35 * self._light
        self._capsule(x0 + shift * r0, y0, x1 + shift * r1, y1, 0.72 * r0, 0.72 * r1, colour)

    def _capsule(self, x0: float, y0: float, x1: float, y1: float, r0: float, r1: float, colour: Colour) -> None:
        length = math.hypot(x1 - x0, y1 - y0)
        if length > 0.5:
            nx, ny = (y1 - y0) / length, (x0 - x1) / length
            corners = [(x0 + nx * r0, y0 + ny * r0), (x1 + nx * r1, y1 + ny * r1)]
            corners += [(x1 - nx * r1, y1 - ny * r1), (x0 - nx * r0, y0 - ny * r0)]
            self._pen.polygon(corners, fill=colour)
        for x, y, r in ((x0, y0, r0), (x1, y1, r1)):
            self._pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def _leg(self, side: int) -> tuple[float, Callable[[], None]]:
        person = self._person
        swing = self._pose.stride * math.sin(self._pose.phase) * side
        # The knee bends while its leg is behind and on its way forwards.
        bend = self._pose.stride * 1.1 * max(0.0, math.cos(self._pose.phase) * side) + 0.05
        width = 0.056 * person.girth
        hip = (side * width, _HIP, 0.0)
        knee = (hip[0], hip[1] - _THIGH * math.cos(swing), _THIGH * math.sin(swing))
        lower = swing - bend
        ankle = (hip[0], knee[1] - _SHIN * math.cos(lower), knee[2] + _SHIN * math.sin(lower))
        toe = (ankle[0], ankle[1] - 0.012, ankle[2] + 0.065)
        bare = person.lower != "trousers"
        thick = 0.05 * person.girth

        def draw() -> None:
            shin = person.skin if bare else person.lower_colour
            self._limb(ankle, toe, (0.026, 0.022), person.shoes)
            self._limb(knee, ankle, (thick * (0.7 if bare else 0.82), thick * (0.5 if bare else 0.66)), shin)
            self._limb(hip, knee, (thick * 1.18, thick * 0.86), person.lower_colour)
            if person.side_stripe:
                seam = [(p[0] + side * thick, p[1], p[2]) for p in ((hip, knee) if bare else (hip, knee, ankle))]
                points = [self._project(p) for p in seam]
                if points[0][2] > -0.02:
                    line = [(x, y) for x, y, _ in points]
                    self._pen.line(line, fill=person.second_colour, width=max(2, round(0.02 * self._size)))

        # Behind what hangs over it, however far it swings.
        return self._project(hip)[2] - 0.2, draw

    def _arm(self, side: int) -> tuple[float, Callable[[], None]]:
        person = self._person
        swing = -0.8 * self._pose.stride * math.sin(self._pose.phase) * side
        across = side * 0.118 * person.shoulders
        shoulder = (across, _SHOULDER - 0.015, 0.0)
        elbow = (
            across + side * 0.022 * person.girth,
            shoulder[1] - _UPPER_ARM * math.cos(swing),
            _UPPER_ARM * math.sin(swing),
        )
        raised = self._pose.telephone and side == 1
        bend = swing + (2.5 if raised else self._pose.elbow)
        hand = (
            elbow[0] - (side * 0.03 if raised else 0.0),
            elbow[1] - _FOREARM * math.cos(bend),
            elbow[2] + _FOREARM * math.sin(bend),
        )
        sleeve = {"vest": 0, "tee": 1}.get(person.upper, 2)
        thick = 0.034 * person.girth * (1.2 if person.upper == "coat" else 1.0)

        def draw() -> None:
            self._limb(elbow, hand, (thick * 0.8, thick * 0.62), person.upper_colour if sleeve == 2 else person.skin)
            self._limb(shoulder, elbow, (thick * 1.15, thick * 0.85), person.upper_colour if sleeve else person.skin)
            x, y, _ = self._project(hand)
            r = 0.024 * self._size
            self._pen.ellipse((x - r, y - r, x + r, y + r), fill=person.skin)
            if person.bag == "hand" and side == -1:
                self._carried(x, y + 0.07 * self._size)

        return self._project(elbow)[2] + 0.016, draw

    def _half_width(self, across: float, deep: float) -> float:
        """Half the width of the outline of an upright elliptic cylinder, in pixels."""
        return math.hypot(across * self._cos, deep * self._sin) * self._size

    def _torso(self) -> None:
        person = self._person
        if person.lower == "skirt":
            self._cone((0.085, 0.07, _HIP + 0.03), (0.135, 0.11, 0.30), person.lower_colour)
        else:
            self._cone((0.083, 0.072, _HIP + 0.04), (0.095, 0.08, _HIP - 0.04), person.lower_colour)
        if person.bag == "shoulder" and self._cos < 0:
            self._at_hip()
        x, y, _ = self._project((0.0, _NECK, 0.0))
        self._capsule(
            x, y - 0.02 * self._size, x, y + 0.03 * self._size, *(0.03 * self._size,) * 2, shade(person.skin, 0.8)
        )
        self._shirt()
        if person.bag == "shoulder":
            self._strap()
            if self._cos >= 0:
                self._at_hip()

    def _cone(self, top: Vector, bottom: Vector, colour: Colour) -> None:
        """Part of the body between two heights: (half width, half depth, height) in statures at each end."""
        girth = self._person.girth
        x, y0, _ = self._project((0.0, top[2], 0.0))
        y1 = self._project((0.0, bottom[2], 0.0))[1]
        w0, w1 = (
            self._half_width(top[0] * girth, top[1] * girth),
            self._half_width(bottom[0] * girth, bottom[1] * girth),
        )
        self._pen.polygon([(x - w0, y0), (x + w0, y0), (x + w1, y1), (x - w1, y1)], fill=shade(colour, 0.78))
        shift = 0.2 * self._light
        inner = [(x - w0 * (0.8 - shift), y0), (x + w0 * (0.8 + shift), y0)]
        inner += [(x + w1 * (0.8 + shift), y1), (x - w1 * (0.8 - shift), y1)]
        self._pen.polygon(inner, fill=colour)

    def _shirt(self) -> None:
        """The upper garment, its pattern wrapped around the body."""
        person = self._person
        hem = _HEM[person.upper]
        levels = [  # height, half width, half depth
            (_NECK - 0.005, 0.038, 0.035),
            (_SHOULDER + 0.008, 0.118 * person.shoulders, 0.06),
            (_SHOULDER - 0.03, 0.132 * person.shoulders, 0.075),
            (0.66, 0.1 * person.girth, 0.076 * person.girth),
            (0.57, 0.092 * person.girth, 0.074 * person.girth),
            (hem, (0.104 if hem > 0.4 else 0.128) * person.girth, 0.084 * person.girth),
        ]
        points = [(self._project((0.0, height, 0.0)), self._half_width(w, d)) for height, w, d in levels]
        widest = max(half for _, half in points)
        x, top, bottom = points[0][0][0], points[0][0][1], points[-1][0][1]
        left = math.floor(x - widest)
        wide, high = math.ceil(2 * widest) + 1, math.ceil(bottom - top) + 1
        outline = [(p[0] - half - left, p[1] - top) for p, half in points]
        outline += [(p[0] + half - left, p[1] - top) for p, half in reversed(points)]
        mask = Image.new("L", (wide, high))
        ImageDraw.Draw(mask).polygon(outline, fill=255)
        across = (np.arange(wide, dtype=np.float32) + np.float32(left - x)) / np.float32(widest)
        texture = fabric(person, across, high, self._pose.heading, self._light)
        self._canvas.paste(Image.fromarray(texture), (left, math.floor(top)), mask)

    def _strap(self) -> None:
        start = self._project((0.07, _SHOULDER + 0.01, 0.0))
        end = self._project((-0.11 * self._person.girth, _HIP + 0.02, 0.0))
        width = max(2, round(0.018 * self._size))
        self._pen.line([start[:2], end[:2]], fill=self._person.bag_colour, width=width)

    def _at_hip(self) -> None:
        x, y, _ = self._project((-0.13 * self._person.girth, _HIP - 0.02, 0.0))
        self._carried(x, y)

    def _carried(self, x: float, y: float) -> None:
        wide, high = (0.035 + 0.035 * abs(self._sin)) * self._size, 0.05 * self._size
        self._pen.rectangle((x - wide, y - high, x + wide, y + high), fill=shade(self._person.bag_colour, 0.72))
        inner = (x - 0.8 * wide, y - 0.6 * high, x + 0.8 * wide, y + 0.9 * high)
        self._pen.rectangle(inner, fill=self._person.bag_colour)

    def _backpack(self) -> None:
        person = self._person
        x, top, near = self._project((0.0, _SHOULDER - 0.005, -0.105))
        bottom = self._project((0.0, 0.555, -0.105))[1]
        half = self._half_width(0.098, 0.05)
        radius = 0.25 * half
        self._pen.rounded_rectangle((x - half, top, x + half, bottom), radius, fill=shade(person.bag_colour, 0.7))
        inner = (x - 0.82 * half, top + 0.02 * self._size, x + 0.82 * half, bottom - 0.012 * self._size)
        self._pen.rounded_rectangle(inner, radius, fill=person.bag_colour)
        if near > 0:
            y = top + 0.62 * (bottom - top)
            self._pen.line((x - 0.7 * half, y, x + 0.7 * half, y), fill=shade(person.bag_colour, 0.6), width=2)

    def _straps_in_front(self) -> None:
        for side in (-1, 1):
            ends = [self._project((side * 0.062, height, 0.07)) for height in (_SHOULDER, 0.62)]
            self._pen.line([p[:2] for p in ends], fill=self._person.bag_colour, width=max(2, round(0.02 * self._size)))

    def _head(self) -> None:
        person = self._person
        if person.bag == "backpack" and self._cos > 0.2:
            self._straps_in_front()
        x, y, _ = self._project((0.0, _HEAD, 0.012))
        wide, high = 0.051 * self._size, 0.068 * self._size
        scalp = person.skin if person.hairstyle == "bald" else person.hair
        self._pen.ellipse((x - wide, y - high, x + wide, y + high), fill=scalp)
        # The face turns away with the heading; a little of the cheek is seen from behind one shoulder.
        seen = max(0.0, min(1.0, 0.62 + 0.7 * self._cos))
        if seen > 0.15:
            middle, half = x + 0.75 * (1 - seen) * wide * math.copysign(1.0, self._sin), wide * 0.92 * seen
            top = y - high * (0.9 if person.hairstyle == "bald" else 0.42)
            face = (max(middle - half, x - wide), top, min(middle + half, x + wide), y + high)
            self._pen.ellipse(face, fill=person.skin)
        if person.hairstyle == "cap":
            self._pen.pieslice(
                (x - wide * 1.08, y - high * 1.1, x + wide * 1.08, y + high * 0.7), 180, 360, fill=person.hat
            )
            peak = x + 0.8 * wide * self._sin
            if self._cos > -0.5:
                self._pen.ellipse(
                    (peak - wide, y - 0.3 * high, peak + wide, y - 0.08 * high), fill=shade(person.hat, 0.75)
                )

    def _long_hair(self) -> None:
        x, y, _ = self._project((0.0, _HEAD, -0.03))
        wide = self._half_width(0.062, 0.045)
        top, bottom = y - 0.045 * self._size, y + 0.135 * self._size
        self._pen.rounded_rectangle((x - wide, top, x + wide, bottom), 0.6 * wide, fill=self._person.hair)
