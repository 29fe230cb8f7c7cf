"""Benchmark inputs like life, and that both sides of an evaluation come to the same figures."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from readers.panoptic import encode
from tests.helpers import REAL_DATA
from tools import bench, bench_data, bench_growth
from tools.bench_works import Place, Skipped


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_data, "SIZE", (72, 96))
    monkeypatch.setattr(bench_data, "IMAGES", 5)
    monkeypatch.setattr(bench_data, "SEGMENTS", (3, 8))


def png(ids: np.ndarray) -> int:
    """Bytes a pixel of a map."""
    file = io.BytesIO()
    encode(ids).save(file, "png")
    return file.tell() / ids.size


def test_maps_have_all_their_segments_and_the_bytes_of_real_ones():
    made = [bench_data.natural_map((360, 640), count, seed=count) for count in (10, 40)]
    assert [len(np.unique(ids)) for ids in made] == [10, 40]
    bytes_made = [png(1000 * ids) for ids in made]
    stripes = np.arange(640) // 64 * 1000 + np.zeros((360, 1), int)
    assert 3 * png(stripes) < bytes_made[0] < bytes_made[1]
    folder = REAL_DATA / "coco_panoptic_sample" / "panoptic_examples"
    if not folder.is_dir():
        pytest.skip(f"{folder}: the sample is not there")
    sizes = [path.stat().st_size / np.prod(Image.open(path).size) for path in folder.glob("*.png")]
    assert 0.4 < np.mean(bytes_made) / np.mean(sizes) < 1.6


def test_pictures_have_the_bytes_of_photographs():
    file = io.BytesIO()
    bench_data.photo((120, 160)).save(file, "jpeg", quality=90)
    assert 0.2 < file.tell() / (120 * 160) < 0.8  # the two of COCO's sample, saved so: 0.46, 0.55


@pytest.mark.parametrize("row", ["pq", "pq-hotcoco", "ap", "ap-hotcoco"])
def test_both_sides_of_an_evaluation_come_to_the_same_figure(row, small, tmp_path):
    work, values = bench.WORKS[row], []
    for name, make in (("ours", work.ours), ("peer", work.peer)):
        folder = Path(tmp_path / name)
        folder.mkdir()
        try:
            evaluate = make(Place(None, folder))
        except Skipped as reason:
            pytest.skip(str(reason))
        values.append(evaluate(0))
        assert evaluate(1) == values[-1]
    assert 0.05 < values[0] < 0.95 and values[0] == pytest.approx(values[1], abs=1e-9)


def test_a_large_picture_is_predicted_with_objects_in_every_window(tmp_path):
    place = Place(None, tmp_path)
    objects = [bench_growth.our_windows(place, side)(0) for side in (600, 1500)]
    # 12 a window of 512 pixels, in windows that overlap by half: most of them are seen again
    assert 12 < objects[0] < objects[1] and objects[1] > 60
    with tifffile.TiffFile(tmp_path / "panoptic.tif") as file:
        assert file.pages[0].shape == (1500, 1500)


def test_masks_that_are_there_are_not_made_again(small, tmp_path):
    again = bench_growth.masks_again(Place(None, tmp_path), 4)
    assert [again(t) for t in (0, 1)] == [1, 1]
    assert len(list((tmp_path / "masks").glob("*.json"))) == 4


def test_bf16_is_left_out_where_the_cpu_has_no_instructions_for_it(monkeypatch):
    for able in (True, False):
        monkeypatch.setattr(bench, "multiplies_bf16", lambda able=able: able)
        for row in ("step", "pq"):
            bench.require_instructions(bench.WORKS[row].ours)
        for row in ("step-bf16", "inference-640-bf16"):
            if able:
                bench.require_instructions(bench.WORKS[row].ours)
            else:
                with pytest.raises(Skipped, match="no instructions for bf16"):
                    bench.require_instructions(bench.WORKS[row].ours)


@pytest.mark.parametrize("calls, seconds", [((9.0,), 9.0), ((9.0, 1.0), 1.0), ((9.0, 3, 1, 2), 2)])
def test_the_making_does_not_count_nor_the_first_of_several_calls(calls, seconds):
    answers = iter([50.0, *map(float, calls), {"peak GB": 0.5}])
    pipe, result = SimpleNamespace(recv=lambda: next(answers)), {"all": []}
    for _ in range(len(calls) + 2):
        bench.hear(None, pipe, result)
    assert (result["seconds"], result["peak GB"]) == (seconds, 0.5) and "all" not in result
