"""Settings are read from files with their origins, and mistakes get one-line errors."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vjepa_data.config_files import COMMAND_LINE, DEFAULT, dump_settings, flatten, load_settings, one_line
from vjepa_data.settings import BadInput, Settings


class Engine(Settings):
    name: Literal["small", "large", "custom"] = "small"
    power_kw: float = Field(default=50.0, gt=0)


class Disc(Settings):
    mode: Literal["disc"] = "disc"
    radius_mm: int


class Drum(Settings):
    mode: Literal["drum"] = "drum"
    width_mm: int = 40


class Car(Settings):
    name: str
    doors: int = 4
    engine: Engine = Engine()
    brakes: tuple[Annotated[Disc | Drum, Field(discriminator="mode")], ...] = Field(default=(Drum(),), min_length=1)


class Van(Settings):
    name: str
    radio: Literal["on", "off"] = "on"
    hitch: bool = False


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refused(kind: type[Settings], path: Path | None, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        load_settings(kind, path, overrides)
    return str(caught.value)


def test_a_file_its_base_and_overrides_are_merged_with_origins(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "name: saloon\nengine: {power_kw: 60}\nbrakes: [{mode: drum}, {mode: drum}]\n")
    child = write(tmp_path / "child.yaml", "base: base.yaml\ndoors: 2\nbrakes: [{mode: disc, radius_mm: 140}]\n")
    loaded = load_settings(Car, child, ["engine.power_kw=7.5e1"])
    car = loaded.settings
    assert (car.name, car.doors, car.engine.power_kw, car.brakes) == ("saloon", 2, 75.0, (Disc(radius_mm=140),))
    assert loaded.origins == {
        "name": str(base),
        "doors": str(child),
        "engine.name": DEFAULT,
        "engine.power_kw": COMMAND_LINE,
        "brakes.0.mode": str(child),
        "brakes.0.radius_mm": str(child),
    }


def test_dumped_settings_load_unchanged(tmp_path: Path) -> None:
    car = load_settings(Car, None, ["name=x", "brakes=[{mode: disc, radius_mm: 1}, {mode: drum}]"]).settings
    assert load_settings(Car, write(tmp_path / "c.yaml", dump_settings(car))).settings == car


def test_a_shown_value_is_a_valid_override() -> None:
    car = load_settings(Car, None, ["name='3'", "brakes=[{mode: disc, radius_mm: 1}, {mode: drum}]"]).settings
    shown = [f"{name}={one_line(value)}" for name, value in flatten(car)]
    assert {"name='3'", "doors=4", "brakes.1.width_mm=40"} < set(shown)
    assert load_settings(Car, None, ["brakes=[{}, {}]", *shown]).settings == car
    assert [one_line(value) for value in (None, True, (0.5, 1.0), 6e-4, (), "a: b")] == [
        "null", "true", "[0.5, 1.0]", "0.0006", "[]", "'a: b'",
    ]  # fmt: skip


def test_a_number_in_a_name_selects_a_list_entry(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "name: x\nbrakes: [{mode: drum}, {mode: drum}]\n")
    assert load_settings(Car, path, ["brakes.1.width_mm=50"]).settings.brakes == (Drum(), Drum(width_mm=50))
    assert "'2' is not an entry of the list; give 0 to 1" in refused(Car, path, "brakes.2.width_mm=50")


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "name: x\nengine: {power_kw: 6e-4}\n")
    assert load_settings(Car, path).settings.engine.power_kw == 6e-4


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: x\ndoor: 3\n", "door is not a setting. Did you mean doors?"),
        ("name: x\nengine: {powerkw: 3}\n", "engine.powerkw is not a setting. Did you mean engine.power_kw?"),
        ("name: x\nbrakes: [{mode: drum, widthmm: 3}]\n", "brakes.0.widthmm is not a setting. Did you mean brakes.0."),
        ("name: x\npower_kw: 3\n", "power_kw is not a setting. Did you mean engine.power_kw?"),
        ("name: x\nxyzzy: 3\n", "xyzzy is not a setting."),
        ("doors: 3\n", "name is missing; add it to the file or give name=VALUE"),
        ("name: x\nengine: {power_kw: -1}\n", "engine.power_kw: expected more than 0, got -1"),
        ("name: x\nengine: {power_kw: .inf}\n", "engine.power_kw: expected a number, got inf"),
        ("name: x\ndoors: many\n", "doors: expected a whole number, got 'many'"),
        ("name: x\ndoors: 2.5\n", "doors: expected a whole number, got 2.5"),
        ("name: x\nengine: 3\n", "engine: expected a group of settings, got 3"),
        ("name: x\nengine: {name: tiny}\n", "engine.name: expected 'small', 'large' or 'custom', got 'tiny'"),
        ("name: x\nbrakes: 3\n", "brakes: expected a list, got 3"),
        ("name: x\nbrakes: []\n", "brakes: expected at least 1 of them, got []"),
        ("name: x\nbrakes: [{mode: disk}]\n", "brakes.0.mode: expected one of 'disc', 'drum', got 'disk'"),
        ("name: x\nbrakes: [{}]\n", "brakes.0.mode is missing"),
        ("name: x\nname: y\n", "'name' is given twice in line 2, column 1"),
        ("base: 3\nname: x\n", "base: expected the path of a YAML file, got 3"),
        ("- 1\n", "expected `name: value` lines, got list"),
        ("name: [\n", "invalid YAML"),
    ],
)
def test_an_error_is_one_line_that_names_the_file(tmp_path: Path, text: str, line: str) -> None:
    answer = refused(Car, write(tmp_path / "car.yaml", text))
    assert answer.startswith(str(tmp_path / "car.yaml"))
    assert line in answer
    assert "\n" not in answer


def test_an_invalid_override_names_the_command_line() -> None:
    assert refused(Car, None, "name=x", "door=3") == f"{COMMAND_LINE}: door is not a setting. Did you mean doors?"
    assert "write name=value" in refused(Car, None, "name")
    answer = refused(Car, None, "name=x", "brakes=[{mode: drum}]", "brakes.0.mode=disk")
    assert answer == f"{COMMAND_LINE}: brakes.0.mode: expected one of 'disc', 'drum', got 'disk'"


def test_off_is_a_string_but_valid_for_a_boolean(tmp_path: Path) -> None:
    path = write(tmp_path / "van.yaml", "name: no\nradio: off\nhitch: on\n")
    van = load_settings(Van, path).settings
    assert (van.name, van.radio, van.hitch) == ("no", "off", True)
    for given, expected in {"true": True, "False": False, "off": False, "yes": True}.items():
        assert load_settings(Van, path, [f"hitch={given}"]).settings.hitch is expected
    assert load_settings(Van, path, ["name=true love"]).settings.name == "true love"
    assert "hitch: expected true or false, got 'truely'" in refused(Van, path, "hitch=truely")


def test_a_missing_file_or_circular_base_is_rejected(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refused(Car, tmp_path / "none.yaml")
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "the file is its own base" in refused(Car, tmp_path / "a.yaml")
