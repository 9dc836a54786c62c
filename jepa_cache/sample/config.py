"""What decides the synthetic sample recordings, down to the last byte."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from jepa_cache.config.schema import Count, RateOrZero, Seed, Settings, Share

FPS_HZ = 20
"""Video frames and control ticks per second; fixed, as in VPT contractor recordings."""


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Settings of one synthetic sample data set; the same settings give the same files on the same machine.

    Shares are fractions of the episodes (quirks) or of the ticks (walking). A quirk falls on exactly
    `round(share * num_episodes)` episodes, chosen by the seed.
    """

    seed: Seed = 0
    num_episodes: Count = 48  # fewer than 36 for training cost held-out error: .499 at 36, .547 at 12
    # Quirks need room: a GUI span and its key presses take up to 3 s of an episode that has one.
    episode_s: Annotated[float, Field(ge=2, le=3600)] = 20.0
    episodes_per_tar: Count = 12
    contrast: Share = 0.3  # of the textures about their mean; low is easier to predict and smaller on disk
    turn_std_deg_per_s: RateOrZero = 100.0  # with the tau below: 15 deg per step at 5 Hz, lag-1 correlation .4
    pitch_std_deg_per_s: RateOrZero = 36.0  # 5 deg per step at 5 Hz
    turn_tau_s: Annotated[float, Field(ge=0.001, le=100)] = 0.12  # correlation time of both turning rates
    walking_share: Share = 0.4  # of the ticks outside the GUI
    stuck_attack_share: Share = 0.95  # 63 of 64 real logs begin with attack held
    wheel_share: Share = 0.25  # episodes in which the mouse wheel moves the hotbar slot
    gui_share: Share = 0.05  # episodes in which the inventory is open for 1 to 2.5 s
    line_mismatch_share: Share = 0.1  # episodes with one line more or fewer than frames, in turn
    crf: Annotated[int, Field(ge=0, le=51)] = 28  # x264 quality: 28 takes half the bytes of 20

    @property
    def num_frames(self) -> int:
        """Video frames per episode, both ends included: 20 s at 20 Hz are 401 frames."""
        return round(self.episode_s * FPS_HZ) + 1
