"""Lines of VPT-like jsonl files to control columns: what the fields mean, and per-tick quirks; knows no video.

Columns, each [M], row t = line t: `tick` int64 (the line's number), `mouse_dx mouse_dy` float64 (mouse counts),
`yaw_deg pitch_deg` float64 (before the line acts, yaw unwrapped as recorded, NaN where absent), `hotbar` int8 (0 to 8,
-1 where absent), `gui gui_inventory` bool, `idle` float32 (1 where nothing is pressed or moved), `milli` int64 (-1
where absent), `xpos_blocks ypos_blocks zpos_blocks` float64 (NaN where absent), and a bool for each of the 23 VPT
buttons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.actions import MAX_ANGLE_DEG, VPT_BUTTONS
from jepa_cache.sources.parsers.untrusted import RecordsError, parse_object

MOUSE_BUTTONS = {0: "attack", 1: "use", 2: "pickItem"}
# The 20 keys of the official VPT code; right.shift, which it lacks, is a second sneak. All other keys are ignored.
KEYS = {
    **{"escape": "ESC", "s": "back", "q": "drop", "w": "forward", "e": "inventory", "space": "jump", "a": "left"},
    **{"d": "right", "left.shift": "sneak", "right.shift": "sneak", "left.control": "sprint", "f": "swapHands"},
    **{str(slot): f"hotbar.{slot}" for slot in range(1, 10)},
}
KEY_PREFIX = "key.keyboard."
COLUMN_INDEX = {name: index for index, name in enumerate(VPT_BUTTONS)}
COLUMN_TYPES = {
    **dict.fromkeys(("mouse_dx", "mouse_dy", "yaw_deg", "pitch_deg"), np.float64),
    **{"hotbar": np.int8, "gui": bool, "gui_inventory": bool, "milli": np.int64},
    **dict.fromkeys(("xpos_blocks", "ypos_blocks", "zpos_blocks"), np.float64),
}

_REQUIRED = object()


class Line(NamedTuple):
    """One parsed line with checked access to its fields; `mouse.dx` is the field dx of the object mouse.

    Every reader raises a RecordsError with the line's number, counted from 1, and the field.
    """

    number: int
    record: dict[str, Any]

    def read(self, name: str, default: Any = _REQUIRED) -> Any:
        """The raw value of a field, or `default` where it is absent."""
        outer, _, inner = name.partition(".")
        value = self.record.get(outer, _REQUIRED)
        if inner and value is not _REQUIRED:
            if not isinstance(value, dict):
                raise RecordsError(f"line {self.number}: {name} lies in something that is no object")
            value = value.get(inner, _REQUIRED)
        value = default if value is _REQUIRED else value
        if value is _REQUIRED:
            raise RecordsError(f"line {self.number}: the field {name} is missing")
        return value

    def read_float(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number; ints of 64 bits pass."""
        value = self.read(name, default)
        if value is default or (type(value) is float and math.isfinite(value)):
            return value
        self.check(type(value) is int and -(2**63) < value < 2**63, name, "a finite number", value)
        return float(value)

    def read_int(self, name: str, default: Any = _REQUIRED) -> int:
        """An integer of 64 bits; 3.0 passes for 3."""
        value = self.read(name, default)
        if type(value) is not int or not -(2**63) < value < 2**63:
            value = self.read_float(name, default)
            self.check(value == int(value) and abs(value) < 2**63, name, "an integer", value)
        return int(value)

    def read_bool(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false; 0 and 1 do not pass."""
        value = self.read(name, default)
        self.check(isinstance(value, bool), name, "true or false", value)
        return value

    def read_list(self, name: str, kind: type, default: Any = _REQUIRED) -> list[Any]:
        """A list of `kind` (str or int)."""
        value = self.read(name, default)
        # bool is an int to isinstance, so the type itself is compared.
        good = isinstance(value, list) and all(type(item) is kind for item in value)
        self.check(good, name, f"a list of {kind.__name__}", value)
        return value

    def check(self, good: bool, name: str, wanted: str, value: Any) -> None:
        """Refuse a field that holds something else than `wanted`."""
        if not good:
            raise RecordsError(f"line {self.number}: {name} must be {wanted}; got {repr(value)[:60]}")


def _iter_lines(data: bytes) -> Iterator[Line | RecordsError]:
    """The lines of a jsonl file, without empty ones at its end; one that is no object is the reason."""
    texts = data.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if texts == [b""]:
        raise RecordsError("the jsonl file holds no line")
    for number, text in enumerate(texts, start=1):
        try:
            yield Line(number, parse_object(text, f"line {number} of {len(texts)}"))
        except RecordsError as error:
            yield error


class ContractorControls(NamedTuple):
    """Columns [M] of the longest run of good lines in a contractor recording, and sentences on what is unusual in it."""

    controls: dict[str, np.ndarray]
    notes: tuple[str, ...]
    first_line: int  # of the run, counted from 0
    num_lines: int  # of the file


def read_contractor(data: bytes) -> ContractorControls:
    """Columns of a contractor jsonl, with the stuck attack button released and wheel changes of the hotbar as key presses.

    Attack is stuck when line 0 says that it was newly pressed; it then counts as released until a later line says so
    again (63 of 64 measured recordings). A hotbar slot that differs from the line before is a press of its key on this
    line, starting from the first line's own slot. Optional: everything but mouse movement and buttons, keys and
    isGuiOpen.

    A line that is no JSON object, or above 1 MiB, is a tick of which nothing is known: it ends a run of good ones, and
    the longest run is kept. Attack is followed from line 0 on for every run; where line 0 itself is bad, it counts as
    stuck. A RecordsError where a field is missing or of a wrong type (this recorder did not write the file), or no line
    is good.

    Source: attack and hotbar rules as in the loader of openai/Video-Pre-Training, except that it starts from slot 0 and
        so injects a press at the start of recordings that begin on another slot. Rates measured on 64 VPT logs.
    """
    best, run = _Columns(0), _Columns(0)
    faults: list[RecordsError] = []
    num_lines, stuck = 0, True
    for row, line in enumerate(_iter_lines(data)):
        num_lines = row + 1
        if isinstance(line, RecordsError):
            faults.append(line)
            best, run = max(best, run, key=len), _Columns(row + 1)
            continue
        buttons = line.read_list("mouse.buttons", int)
        new_buttons = line.read_list("mouse.newButtons", int, [])
        stuck = stuck and (0 not in new_buttons if row > 0 else new_buttons == [0])
        if stuck:
            buttons = [button for button in buttons if button != 0]
        view_deg = line.read_float("yaw", math.nan), line.read_float("pitch", math.nan)
        keys = line.read_list("keyboard.keys", str)
        run.add(line, keys, buttons, line.read_bool("isGuiOpen"), view_deg)
        run.ticks.append(line.read_int("tick", row))
    best = max(best, run, key=len)
    if not len(best):
        raise faults[0]
    notes, first = [], best.first_line
    if faults:
        notes.append(
            f"{len(faults)} of {num_lines} lines cannot be used (first: {faults[0]}): the longest run of good ones is kept, lines "
            f"{first + 1} to {first + len(best)}"
        )
    jumps = np.flatnonzero(np.diff(best.ticks) != 1)
    if len(jumps):
        before, after = best.ticks[jumps[0]], best.ticks[jumps[0] + 1]
        notes.append(
            f"the field tick jumps at {len(jumps)} places, first at line {first + jumps[0] + 2}: {before} to {after}; ticks are "
            "counted by line"
        )
    return ContractorControls(best.build(), tuple(notes), first, num_lines)


def read_simple(data: bytes, camera_unit: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns of the simple schema: timestamp, mouse {dx, dy, buttons}, keyboard, camera, hotbar.

    `keyboard` is a list of keys or {keys: [...]}, with or without "key.keyboard."; `camera` is {yaw, pitch} or [yaw,
    pitch], absolute (before the row acts) or the change that the row makes, as `camera_unit` says. Changes are summed
    from 0 at the first row, so yaw and pitch are then relative to the start. camera, hotbar, mouse.buttons and
    isGuiOpen (false) are optional.

    Returns:
        Columns [M], and the rows' times [M] float64, seconds since the video's start.

    Raises:
        RecordsError: A bad line, a field that is missing or of a wrong type, times that go backwards, or changes whose
            sum is beyond `MAX_ANGLE_DEG`.
    """
    columns = _Columns(0)
    times_s: list[float] = []
    kind, unit = camera_unit.split("_")
    scale = math.degrees(1.0) if unit == "rad" else 1.0
    sums = [0.0, 0.0]
    for line in _iter_lines(data):
        if isinstance(line, RecordsError):
            raise line
        times_s.append(line.read_float("timestamp"))
        if len(times_s) > 1 and times_s[-1] < times_s[-2]:
            raise RecordsError(f"line {line.number}: the timestamp goes back from {times_s[-2]} to {times_s[-1]} s")
        keys = line.read_list("keyboard.keys" if isinstance(line.read("keyboard"), dict) else "keyboard", str)
        buttons = line.read_list("mouse.buttons", int, [])
        view = [value * scale for value in _read_camera(line)]
        columns.add(line, keys, buttons, line.read_bool("isGuiOpen", False), sums if kind == "delta" else view)
        sums = [total + change for total, change in zip(sums, view, strict=True)]
        for name, total in zip(("yaw", "pitch"), sums, strict=True):
            if kind == "delta" and abs(total) > MAX_ANGLE_DEG:
                raise RecordsError(
                    f"line {line.number}: the changes of camera.{name} add up to {total:g} degrees, and later ones would be lost in "
                    f"that sum (at most {MAX_ANGLE_DEG:g})"
                )
    return columns.build(), np.array(times_s)


def _read_camera(line: Line) -> tuple[float, float]:
    camera = line.read("camera", None)
    if camera is None:
        return math.nan, math.nan
    if isinstance(camera, list) and len(camera) == 2:
        line = Line(line.number, {"camera": dict(zip(("yaw", "pitch"), camera, strict=True))})
    line.check(isinstance(line.read("camera"), dict), "camera", "{yaw, pitch} or [yaw, pitch]", camera)
    return line.read_float("camera.yaw"), line.read_float("camera.pitch")


class _Columns:
    """Rows collected as Python numbers, so that a line's large fields (stats, inventory) are dropped at once."""

    def __init__(self, first_line: int) -> None:
        self.first_line = first_line  # counted from 0
        self.ticks: list[int] = []  # as the lines number themselves
        self._rows: list[tuple[float, ...]] = []
        self._held: list[list[int]] = []
        self._slot = -1

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, line: Line, keys: list[str], buttons: list[int], gui: bool, view_deg: Sequence[float]) -> None:
        slot = line.read_int("hotbar", -1)
        absent = slot == -1 and line.read("hotbar", None) is None
        line.check(0 <= slot <= 8 or absent, "hotbar", "a slot from 0 to 8", slot)
        names = {KEYS.get(key.removeprefix(KEY_PREFIX)) for key in keys}
        names |= {MOUSE_BUTTONS.get(button) for button in buttons}
        if -1 not in (slot, self._slot) and slot != self._slot:
            names.add(f"hotbar.{slot + 1}")
        self._slot = slot
        movement = line.read_float("mouse.dx"), line.read_float("mouse.dy")
        screen = slot, gui, line.read_bool("isGuiInventory", False), line.read_int("milli", -1)
        position = (line.read_float(name, math.nan) for name in ("xpos", "ypos", "zpos"))
        self._rows.append((*movement, *view_deg, *screen, *position))
        self._held.append([COLUMN_INDEX[name] for name in names - {None}])

    def build(self) -> dict[str, np.ndarray]:
        held = np.zeros((len(VPT_BUTTONS), len(self)), bool)
        for row, indices in enumerate(self._held):
            held[indices, row] = True
        controls = {"tick": np.arange(self.first_line, self.first_line + len(self), dtype=np.int64)}
        for (name, dtype), values in zip(COLUMN_TYPES.items(), zip(*self._rows, strict=True), strict=True):
            controls[name] = np.array(values, dtype)
        still = ~held.any(axis=0) & (controls["mouse_dx"] == 0) & (controls["mouse_dy"] == 0)
        controls["idle"] = still.astype(np.float32)
        return {**controls, **dict(zip(VPT_BUTTONS, held, strict=True))}
