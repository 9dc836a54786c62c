"""Whether the simulated robot can run here."""

import pytest

from jepa_cache.sample.robot import find_assets, import_mujoco


def _find_lack() -> str:
    try:
        import_mujoco()
        find_assets()
    except ValueError as error:
        return str(error)
    return ""


LACK = _find_lack()
needs_robot = pytest.mark.skipif(bool(LACK), reason=LACK)
