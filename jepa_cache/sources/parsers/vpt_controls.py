"""Lines of VPT-like jsonl files to control columns: what the fields mean, and per-tick quirks; knows no video.

Columns, each [M], row t = line t: `tick` int64 (the line's number), `mouse_dx mouse_dy` float64 (mouse counts), `yaw_deg pitch_deg`
float64 (before the line acts, yaw unwrapped as recorded, NaN where absent), `hotbar` int8 (0 to 8, -1 where absent), `gui
gui_inventory` bool, `idle` float32 (1 where nothing is pressed or moved), `milli` int64 (-1 where absent), `xpos_blocks
ypos_blocks zpos_blocks` float64 (NaN where absent), and a bool for each of the 23 VPT buttons.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.actions import MAX_ANGLE_DEG, VPT_BUTTONS
from jepa_cache.sources.parsers.untrusted import MAX_LINE_BYTES, RecordsError, parse_object

_REQUIRED = object()


class LineError(RecordsError):
    """A line that cannot be used; the message holds its number, counted from 1, and the field."""


class Line:
    """One parsed line with checked access to its fields; `mouse.dx` is the field dx of the object mouse."""

    def __init__(self, number: int, record: dict[str, Any]) -> None:
        """Hold line `number`, counted from 1."""
        self.number = number
        self._record = record

    def read(self, name: str, default: Any = _REQUIRED) -> Any:
        """The raw value of a field, or `default` where it is absent.

        Raises:
            LineError: The field is absent and has no default, or what should hold it is no object.
        """
        outer, _, inner = name.partition(".")
        value = self._record.get(outer, _REQUIRED)
        if inner and value is not _REQUIRED:
            if not isinstance(value, dict):
                raise LineError(f"line {self.number}: {name} lies in something that is no object")
            value = value.get(inner, _REQUIRED)
        if value is not _REQUIRED:
            return value
        if default is _REQUIRED:
            raise LineError(f"line {self.number}: the field {name} is missing")
        return default

    def read_float(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number; ints pass."""
        value = self.read(name, default)
        if value is default or (type(value) is float and math.isfinite(value)):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number", value)
        if (isinstance(value, int) and value.bit_length() > 63) or not math.isfinite(value):
            raise self.wrong(name, "a finite number", value)
        return float(value)

    def read_int(self, name: str, default: Any = _REQUIRED) -> int:
        """An integer of 64 bits; 3.0 passes for 3."""
        value = self.read(name, default)
        if type(value) is int and -(2**63) < value < 2**63:
            return value
        value = self.read_float(name, default)
        if value is not default and (value != int(value) or abs(value) >= 2**63):
            raise self.wrong(name, "an integer", value)
        return int(value)

    def read_bool(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false; 0 and 1 do not pass."""
        value = self.read(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def read_list(self, name: str, kind: type, default: Any = _REQUIRED) -> list[Any]:
        """A list of `kind` (str or int)."""
        value = self.read(name, default)
        # bool is an int to isinstance, so the type itself is compared.
        if value is not default and not (isinstance(value, list) and all(type(item) is kind for item in value)):
            raise self.wrong(name, f"a list of {kind.__name__}", value)
        return value

    def wrong(self, name: str, wanted: str, value: Any) -> LineError:
        """The error for a field that holds something else than `wanted`."""
        return LineError(f"line {self.number}: {name} must be {wanted}; got {repr(value)[:60]}")


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a jsonl file, without empty ones at its end. Raises a LineError when there is none."""
    lines = data.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if lines == [b""]:
        raise LineError("the jsonl file holds no line")
    return lines


def parse_line(number: int, text: bytes, num_lines: int) -> Line:
    """Parse line `number` of `num_lines`. Raises a RecordsError when it is too long, no JSON, or no object."""
    return Line(number, parse_object(text, f"line {number} of {num_lines}", MAX_LINE_BYTES))


MOUSE_BUTTONS = {0: "attack", 1: "use", 2: "pickItem"}
# The 20 keys of the official VPT code; right.shift, which it lacks, is a second sneak. All other keys are ignored.
KEYS = {
    "escape": "ESC",
    "s": "back",
    "q": "drop",
    "w": "forward",
    **{str(slot): f"hotbar.{slot}" for slot in range(1, 10)},
    "e": "inventory",
    "space": "jump",
    "a": "left",
    "d": "right",
    "left.shift": "sneak",
    "right.shift": "sneak",
    "left.control": "sprint",
    "f": "swapHands",
}
KEY_PREFIX = "key.keyboard."
COLUMN_INDEX = {name: index for index, name in enumerate(VPT_BUTTONS)}


class ContractorControls(NamedTuple):
    """Columns [M] of the longest run of good lines in a contractor recording, and sentences on what is unusual in it.

    `first_line` is the run's first one, counted from 0; the file holds `num_lines`. Without a bad line the run is everything.
    """

    controls: dict[str, np.ndarray]
    notes: tuple[str, ...]
    first_line: int
    num_lines: int


def read_contractor(data: bytes) -> ContractorControls:
    """Columns of a contractor jsonl, with the stuck attack button released and wheel changes of the hotbar as key presses.

    Attack is stuck when line 0 says that it was newly pressed; it then counts as released until a later line says so
    again (63 of 64 measured recordings). A hotbar slot that differs from the line before is a press of its key on this
    line, starting from the first line's own slot. Optional: everything but mouse movement and buttons, keys and isGuiOpen.

    A line that is no JSON object, or above 1 MiB, is a tick of which nothing is known: it ends a run of good ones, and the
    longest run is kept. Attack is followed from line 0 on for every run; where line 0 itself is bad, it counts as stuck.

    Raises:
        RecordsError: A field that is missing or of a wrong type: such a file was not written by this recorder. Or no good line.

    Source: attack and hotbar rules as in the loader of openai/Video-Pre-Training, except that it starts from slot 0 and so
        injects a press at the start of recordings that begin on another slot. Rates measured on 64 VPT logs.
    """
    lines = split_lines(data)
    best, run = _Columns(0), _Columns(0)
    faults: list[RecordsError] = []
    stuck = True
    for row, text in enumerate(lines):
        try:
            line = parse_line(row + 1, text, len(lines))
        except RecordsError as error:
            faults.append(error)
            best, run = max(best, run, key=len), _Columns(row + 1)
            continue
        buttons = line.read_list("mouse.buttons", int)
        new_buttons = line.read_list("mouse.newButtons", int, [])
        stuck = stuck and (0 not in new_buttons if row > 0 else new_buttons == [0])
        if stuck:
            buttons = [button for button in buttons if button != 0]
        view_deg = line.read_float("yaw", math.nan), line.read_float("pitch", math.nan)
        keys = line.read_list("keyboard.keys", str)
        run.add(line, keys, buttons, line.read_bool("isGuiOpen"), view_deg, line.read_int("tick", row))
    best = max(best, run, key=len)
    if not len(best):
        raise faults[0]
    notes = []
    if faults:
        notes.append(
            f"{len(faults)} of {len(lines)} lines cannot be used (first: {faults[0]}): the longest run of good ones is kept, lines "
            f"{best.first_line + 1} to {best.first_line + len(best)}"
        )
    jumps = np.flatnonzero(np.diff(best.ticks) != 1)
    if len(jumps):
        notes.append(
            f"the field tick jumps at {len(jumps)} places, first at line {best.first_line + jumps[0] + 2}: "
            f"{best.ticks[jumps[0]]} to {best.ticks[jumps[0] + 1]}; ticks are counted by line"
        )
    return ContractorControls(best.build(), tuple(notes), best.first_line, len(lines))


class SimpleControls(NamedTuple):
    """Columns [M] of a recording in the simple schema, and the rows' times [M] float64, seconds since the video's start."""

    controls: dict[str, np.ndarray]
    times_s: np.ndarray


def read_simple(data: bytes, camera_unit: str) -> SimpleControls:
    """Columns of the simple schema: timestamp, mouse {dx, dy, buttons}, keyboard, camera, hotbar.

    `keyboard` is a list of keys or {keys: [...]}, with or without "key.keyboard."; `camera` is {yaw, pitch} or [yaw, pitch],
    absolute (before the row acts) or the change that the row makes. Changes are summed from 0 at the first row, so yaw and
    pitch are then relative to the start. camera, hotbar, mouse.buttons and isGuiOpen (false) are optional.

    Args:
        data: The jsonl file.
        camera_unit: delta_deg, delta_rad, absolute_deg or absolute_rad.

    Raises:
        RecordsError: A bad line, a field that is missing or of a wrong type, times that go backwards, or changes whose sum is beyond
            `MAX_ANGLE_DEG`.
    """
    columns = _Columns(0)
    times_s: list[float] = []
    kind, unit = camera_unit.split("_")
    scale = math.degrees(1.0) if unit == "rad" else 1.0
    sums = [0.0, 0.0]
    lines = split_lines(data)
    for number, text in enumerate(lines, start=1):
        line = parse_line(number, text, len(lines))
        times_s.append(line.read_float("timestamp"))
        if len(times_s) > 1 and times_s[-1] < times_s[-2]:
            raise LineError(f"line {line.number}: the timestamp goes back from {times_s[-2]} to {times_s[-1]} s")
        keys = line.read_list("keyboard.keys" if isinstance(line.read("keyboard"), dict) else "keyboard", str)
        buttons = line.read_list("mouse.buttons", int, [])
        view = [value * scale for value in _read_camera(line)]
        gui = line.read_bool("isGuiOpen", False)
        columns.add(line, keys, buttons, gui, tuple(sums if kind == "delta" else view), line.number - 1)
        sums = [total + change for total, change in zip(sums, view, strict=True)]
        for name, total in zip(("yaw", "pitch"), sums, strict=True):
            if kind == "delta" and abs(total) > MAX_ANGLE_DEG:
                raise LineError(
                    f"line {line.number}: the changes of camera.{name} add up to {total:g} degrees, and later ones would be lost in "
                    f"that sum (at most {MAX_ANGLE_DEG:g}); is this line's change a mistake of the recorder?"
                )
    return SimpleControls(columns.build(), np.array(times_s))


def _read_camera(line: Line) -> tuple[float, float]:
    camera = line.read("camera", None)
    if isinstance(camera, list) and len(camera) == 2:
        line = Line(line.number, {"camera": {"yaw": camera[0], "pitch": camera[1]}})
    elif camera is None:
        return math.nan, math.nan
    elif not isinstance(camera, dict):
        raise line.wrong("camera", "{yaw, pitch} or [yaw, pitch]", camera)
    return line.read_float("camera.yaw"), line.read_float("camera.pitch")


class _Columns:
    """Rows collected as Python numbers, so that a line's large fields (stats, inventory) are dropped at once."""

    def __init__(self, first_line: int) -> None:
        self.first_line = first_line  # counted from 0
        self.ticks: list[int] = []  # as the lines number themselves
        self._rows: list[tuple[float, ...]] = []
        self._held: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, line: Line, keys: list[str], buttons: list[int], gui: bool, view_deg: tuple[float, ...], tick: int
    ) -> None:
        hotbar = line.read_int("hotbar", -1)
        if not -1 <= hotbar <= 8 or (hotbar == -1 and line.read("hotbar", None) is not None):
            raise line.wrong("hotbar", "a slot from 0 to 8", hotbar)
        names = {KEYS.get(key.removeprefix(KEY_PREFIX)) for key in keys}
        names |= {MOUSE_BUTTONS.get(button) for button in buttons}
        if self._rows and -1 not in (hotbar, self._rows[-1][2]) and hotbar != self._rows[-1][2]:
            names.add(f"hotbar.{hotbar + 1}")
        self._rows.append(
            (
                line.read_float("mouse.dx"),
                line.read_float("mouse.dy"),
                hotbar,
                gui,
                line.read_bool("isGuiInventory", False),
                line.read_int("milli", -1),
                line.read_float("xpos", math.nan),
                line.read_float("ypos", math.nan),
                line.read_float("zpos", math.nan),
                *view_deg,
            )
        )
        self._held.append([COLUMN_INDEX[name] for name in names - {None}])
        self.ticks.append(tick)

    def build(self) -> dict[str, np.ndarray]:
        num_ticks = len(self._rows)
        held = np.zeros((len(VPT_BUTTONS), num_ticks), bool)
        for row, indices in enumerate(self._held):
            held[indices, row] = True
        dx, dy, hotbar, gui, gui_inventory, milli, x, y, z, yaw_deg, pitch_deg = zip(*self._rows, strict=True)
        controls = {
            "tick": np.arange(self.first_line, self.first_line + num_ticks, dtype=np.int64),
            "mouse_dx": np.array(dx, np.float64),
            "mouse_dy": np.array(dy, np.float64),
            "yaw_deg": np.array(yaw_deg, np.float64),
            "pitch_deg": np.array(pitch_deg, np.float64),
            "hotbar": np.array(hotbar, np.int8),
            "gui": np.array(gui, bool),
            "gui_inventory": np.array(gui_inventory, bool),
            "milli": np.array(milli, np.int64),
            "xpos_blocks": np.array(x, np.float64),
            "ypos_blocks": np.array(y, np.float64),
            "zpos_blocks": np.array(z, np.float64),
        }
        still = ~held.any(axis=0) & (controls["mouse_dx"] == 0) & (controls["mouse_dy"] == 0)
        controls["idle"] = still.astype(np.float32)
        return {**controls, **dict(zip(VPT_BUTTONS, held, strict=True))}
