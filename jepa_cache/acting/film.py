"""The film of an experiment: goal picture, live camera, the tokens that the planner foresees, and the distance that is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.config.schema import CONTROLS
from jepa_cache.control.closed_loop import Episode, Task
from jepa_cache.evaluation.page import read_picture, render
from jepa_cache.evaluation.pictures import TokenColours, new_figure
from jepa_cache.evaluation.verdict import UNTRAINED
from jepa_cache.sample.robot_episodes import encode_pictures

STEP_MS, LAST_MS = 400, 2500  # how long each step and the last one are shown
STILL_STEPS = (0, 1, 2, 4, -1)  # of the first episode, that the still shows
MP4_COPIES = 2  # of each picture: the simulator's steps are 0.2 s


class Film(NamedTuple):
    """An episode with K actions and L >= K + 1 moments, ready to draw."""

    episode: Episode
    goal: np.ndarray  # uint8 [h, w, 3]
    seen: np.ndarray  # [L, N, E] tokens of the frames
    foreseen: np.ndarray  # [K, N, E] tokens at the end of the plan that was made at each moment
    aim: np.ndarray  # [N, E] tokens of the goal picture
    task: Task


def write_film(films: Sequence[Film], metrics: Mapping[str, Any], folder: Path) -> None:
    """Write film.gif and film.mp4 of some episodes one after the other, film.png (a still of the first), and report.html of all figures."""
    from PIL import Image

    if films:
        colours = TokenColours(np.concatenate([np.concatenate((film.seen, film.aim[None])) for film in films]))
        pictures, durations = [], []
        for number, film in enumerate(films):
            title = f"{film.task.name}, episode {number + 1} of {len(films)}"
            moments = range(len(film.seen))
            pictures += [draw_moment(film, colours, moment, title) for moment in moments]
            durations += [STEP_MS] * (len(film.seen) - 1) + [LAST_MS]
        images = [Image.fromarray(picture).quantize(128, dither=Image.Dither.NONE) for picture in pictures]
        images[0].save(folder / "film.gif", save_all=True, append_images=images[1:], duration=durations, loop=0)
        shown = [picture for picture in pictures for _ in range(MP4_COPIES)]
        (folder / "film.mp4").write_bytes(encode_pictures(shown, 23))
        Image.fromarray(draw_still(films[0], colours)).quantize(192).save(folder / "film.png", optimize=True)
    gif = read_picture(folder / "film.gif")
    named = {"metrics": metrics, "controls": CONTROLS, "untrained": UNTRAINED, "film": gif}
    page = render(Path(__file__).parent / "report.html.j2", {}, **named)
    (folder / "report.html").write_text(page, encoding="utf-8")


def draw_moment(film: Film, colours: TokenColours, moment: int, title: str) -> np.ndarray:
    """One picture uint8 [h, w, 3], of even height and width: four panels above the curve of the distance."""
    figure = new_figure(8.0, 4.0)
    panels = figure.add_gridspec(2, 4, height_ratios=(2.2, 1))
    for place, (name, picture) in enumerate(_list_panels(film, colours, moment).items()):
        axes = _show(figure.add_subplot(panels[0, place]), picture)
        axes.set_title(name, fontsize=9)
    curve = figure.add_subplot(panels[1, :])
    draw_distance(film, curve, moment)
    figure.suptitle(title, fontsize=10)
    return _to_array(figure)


def draw_still(film: Film, colours: TokenColours) -> np.ndarray:
    """One picture uint8 [h, w, 3] of a whole episode: what is seen and foreseen at some of its moments, the goal, the distance."""
    last = len(film.seen) - 1
    moments = sorted({min(step % len(film.seen), last) for step in STILL_STEPS})
    figure = new_figure(10.4, 3.0)
    figure.set_dpi(120)
    grid = figure.add_gridspec(2, len(moments) + 3)
    for column, moment in enumerate([*moments, None]):
        if moment is None:
            tops = "goal picture", film.goal, _paint(film.aim, colours)
        else:
            shown = _list_panels(film, colours, moment)
            tops = "at the end" if moment == last else f"step {moment}", shown["camera"], shown["foreseen"]
        for row, picture in enumerate(tops[1:]):
            axes = _show(figure.add_subplot(grid[row, column]), picture)
            if row == 0:
                axes.set_title(tops[0], fontsize=9)
            if column == 0:
                axes.set_ylabel(("camera", "foreseen tokens")[row], fontsize=9)
    draw_distance(film, figure.add_subplot(grid[:, -2:]), last)
    return _to_array(figure)


def draw_distance(film: Film, axes: Any, moment: int) -> None:
    """The distance (cm) up to a moment, on axes that are those of the whole episode."""
    distances = 100 * np.array(film.episode.distances_m)
    axes.plot(range(moment + 1), distances[: moment + 1], marker="o", ms=4, color="#1f77b4")
    axes.axhline(100 * film.task.within_m, color="#2ca02c", linestyle=":", label=f"{100 * film.task.within_m:g} cm")
    axes.set(xlim=(-0.3, len(distances) - 0.7), ylim=(0, 1.1 * distances.max()), xlabel="step")
    axes.set_ylabel(f"{film.task.thing}:\ncm to the goal", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="upper right")
    axes.grid(alpha=0.3)


def _list_panels(film: Film, colours: TokenColours, moment: int) -> dict[str, np.ndarray]:
    """What is shown of a moment; in the still steps at the end nothing is foreseen, so the last plan's stays."""
    foreseen = film.foreseen[min(moment, len(film.foreseen) - 1)]
    return {
        "camera": film.episode.frames[moment],
        "foreseen": _paint(foreseen, colours),
        "goal's tokens": _paint(film.aim, colours),
        "goal picture": film.goal,
    }


def _show(axes: Any, picture: np.ndarray) -> Any:
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    return axes


def _paint(tokens: np.ndarray, colours: TokenColours) -> np.ndarray:
    side = round(len(tokens) ** 0.5)
    return colours.paint(tokens[None], (side, side))[0]


def _to_array(figure: Any) -> np.ndarray:
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    height, width = (size // 2 * 2 for size in picture.shape[:2])
    return np.ascontiguousarray(picture[:height, :width])
