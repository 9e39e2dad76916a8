"""Every public name has its place in the API reference."""

import importlib.util
import types
from pathlib import Path

import pytest

import pyro_flows_ext

SPEC = importlib.util.spec_from_file_location(
    "docs_api", Path(__file__).parents[2] / "docs" / "api.py"
)
api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(api)


def _rooms():
    """The subpackages that export names, but for the command line."""
    folder = Path(pyro_flows_ext.__path__[0])
    return sorted(p.parent.name for p in folder.glob("*/__init__.py") if p.parent.name != "cli")


def test_every_room_has_a_page():
    assert set(_rooms()) <= set(api.ROOMS)


@pytest.mark.parametrize("room", api.ROOMS)
def test_every_name_of_a_room_is_on_its_page(room):
    names, page = api.public_names(room), api.room_page(room)
    assert names
    for name in names:
        home = api.address(room, name).split(".")[-2]
        entry = "autosummary" if home != room else f":: {name}\n"
        assert entry in page, name
        assert f":: {name}\n" in api.room_page(home), name


@pytest.mark.parametrize("room", api.ROOMS)
def test_groups_hold_names_that_exist_once(room):
    listed = [name for names in api.groups(room).values() for name in names]
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == set(api.public_names(room))


def test_every_name_of_the_front_door_is_listed():
    page = api.front_door_page()
    for name in pyro_flows_ext.__all__:
        assert f"``pf.{name}``" in page
        value = getattr(pyro_flows_ext, name)
        if not isinstance(value, types.ModuleType):
            assert value.__doc__, name
