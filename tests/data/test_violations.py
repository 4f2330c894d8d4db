"""Films of physical violations: shared frames, impossible events, and no cue other than physics."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vjepa_data.evaluation.violations import FilmRequest, ViolationSet, read_film, read_violations
from vjepa_data.settings import BadInput
from vjepa_data.synthetic.physics import write_video
from vjepa_data.synthetic.violations import (
    HIDDEN_FRAMES,
    LAWS,
    describe,
    draw_films,
    draw_quadruplet,
    read_scene,
    write_violations,
)

ROUND = len(LAWS) * len(HIDDEN_FRAMES)


@pytest.mark.parametrize("law", LAWS)
def test_all_films_are_equal_around_the_change(law: str) -> None:
    for number in range(LAWS.index(law), 2 * ROUND, len(LAWS)):
        scene = draw_quadruplet(3, number)
        films = draw_films(scene)
        around = slice(scene.change - scene.hidden_frames // 2, scene.change + scene.hidden_frames // 2)
        assert all(np.array_equal(films["aa"][around], film[around]) for film in films.values())
        assert not np.array_equal(films["aa"], films["bb"])


def test_each_half_is_in_a_possible_and_an_impossible_film() -> None:
    scene = draw_quadruplet(0, 2)
    films = draw_films(scene)
    for name, film in films.items():
        first, second = films[name[0] * 2], films[name[1] * 2]
        assert np.array_equal(film[: scene.change], first[: scene.change])
        assert np.array_equal(film[scene.change :], second[scene.change :])


def test_the_labels_of_a_film_are_its_scene() -> None:
    scene = draw_quadruplet(0, 4)
    labels = json.loads(json.dumps(describe(scene, "ba")))
    assert read_scene(labels) == replace(scene, a=scene.b, b=scene.a)
    assert labels["possible"] is False


def test_a_film_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    few = write_violations(tmp_path / "few", quadruplets=1, seed=5)
    more = write_violations(tmp_path / "more", quadruplets=2, seed=5)
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in more[:4]]
    films = read_violations(tmp_path / "more")
    assert [(films.films[a].name, films.films[b].name) for a, b in films.pairs[:2]] == [
        ("possible/film_000000_aa.mp4", "impossible/film_000000_ab.mp4"),
        ("possible/film_000000_bb.mp4", "impossible/film_000000_ba.mp4"),
    ]


@pytest.mark.parametrize(("changes", "said"), [({"quadruplets": 0}, "at least 1"), ({"px": 47}, "even")])
def test_bad_sizes_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        write_violations(tmp_path, **{"quadruplets": 1, "seed": 0, **changes})


# ---- layouts of published benchmarks


def picture(value: int) -> np.ndarray:
    return np.full((32, 32, 3), value, np.uint8)


def film(path: Path, frames: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [picture(10 * number) for number in range(frames)], fps=12)


def intphys(folder: Path) -> None:
    """Film 1 differs from 2 and 4 at once, and from 3 in the end."""
    ways = {
        "1": ([0, 0, 0, 9], True),
        "2": ([5, 5, 5, 9], True),
        "3": ([0, 0, 0, 4], False),
        "4": ([5, 5, 7, 9], False),
    }
    for block in ("O1", "O3"):
        for number, (values, possible) in ways.items():
            scene = folder / block / "scene_01" / number
            (scene / "scene").mkdir(parents=True)
            for frame, value in enumerate(values):
                Image.fromarray(picture(value)).save(scene / "scene" / f"scene_{frame + 1:03d}.png")
            (scene / "status.json").write_text(json.dumps({"header": {"is_possible": possible}}))


def grasp(folder: Path) -> None:
    for law in ("Gravity", "Inertia"):
        for kind in ("P", "IP"):
            film(folder / f"{kind}_{law}" / "1.mp4")


def inflevel(folder: Path) -> None:
    film(folder / "gravity" / "a.mp4", 12)
    film(folder / "gravity" / "b.mp4", 10)
    row = {"vid1_path": "gravity/a.mp4", "vid1_label": "impossible", "vid1_end_priming_2": 3}
    row |= {"vid2_path": "gravity/b.mp4", "vid2_label": "possible", "vid2_end_priming_2": 2}
    with open(folder / "gravity.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)


def intphys2(folder: Path, *, secret: bool = False) -> None:
    rows = []
    for kind in ("1_Possible", "1_Impossible", "2_Possible", "2_Impossible"):
        film(folder / "Videos" / f"{kind}.mp4")
        rows.append({"filename": kind} if secret else {"SceneIndex": 7, "filename": kind, "type": kind})
        if not secret:
            rows[-1]["condition"] = "immutability_texture"
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def pairs(found: ViolationSet) -> list[tuple[str, str, str]]:
    films = found.films
    assert all(films[a].possible and films[b].possible is False for a, b in found.pairs)
    return [(films[a].condition, films[a].name, films[b].name) for a, b in found.pairs]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (intphys, [(o, f"{o}/scene_01/{a}", f"{o}/scene_01/{b}") for o in ("O1", "O3") for a, b in ("13", "24")]),
        (grasp, [(law, f"P_{law}/1.mp4", f"IP_{law}/1.mp4") for law in ("Gravity", "Inertia")]),
        (inflevel, [("gravity", "gravity/b.mp4", "gravity/a.mp4")]),
        (intphys2, [("immutability", f"{side}_Possible.mp4", f"{side}_Impossible.mp4") for side in (1, 2)]),
    ],
)
def test_the_folders_of_others_are_read(
    write: Callable[[Path], None], expected: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    write(tmp_path)
    assert pairs(read_violations(tmp_path)) == expected


def test_films_of_inflevel_end_together(tmp_path: Path) -> None:
    inflevel(tmp_path)
    found = read_violations(tmp_path)
    assert [one.first for one in found.films] == [5, 3]  # 7 frames each: of 12 - 4 and of 10 - 3
    shown = [read_film(FilmRequest(one.path, one.first, 2, 12.0, 32)) for one in found.films]
    assert [len(frames) for frames in shown] == [4, 4]


def test_a_secret_split_has_films_and_no_pairs(tmp_path: Path) -> None:
    intphys2(tmp_path, secret=True)
    found = read_violations(tmp_path)
    assert ([one.possible for one in found.films], list(found.pairs)) == ([None] * 4, [])


def test_missing_films_and_unknown_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no benchmark of violations\. Give a folder"):
        read_violations(tmp_path)
    grasp(tmp_path)
    (tmp_path / "IP_Gravity" / "1.mp4").unlink()
    with pytest.raises(BadInput, match=r"1 films of GRASP are missing, for instance IP_Gravity/1\.mp4"):
        read_violations(tmp_path)
