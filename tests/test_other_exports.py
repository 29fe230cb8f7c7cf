"""What is said of folders that another tool wrote, or in another format of ours."""

from pathlib import Path

import pytest

from readers.annotations.others import hint
from tests.test_importer import (
    SCENES,
    import_refused,
    write_coco,
    write_labelme,
)

FOUND = {  # what lies in a folder -> what to choose
    ("annotations.xml", "<?xml ?>\n<annotations>\n<version>1.1"): "in CVAT export COCO 1.0",
    ("Annotations/a.xml", "<annotation>\n<folder>x</folder><object><bndbox>"): "SegmentationObject",
    ("a.xml", "<annotation><filename>a</filename><object><polygon>"): "open it in CVAT",
    (
        "via_region_data.json",
        '{"a.png99": {"regions": [{"shape_attributes": {}}]}}',
    ): "in VIA choose",
    ("via.csv", "filename,file_size,region_shape_attributes"): "in VIA choose",
    ("meta.json", '{"classes": [{"title": "cat"}]}'): "in Supervisely run Export to COCO",
    (
        "ds0/ann/a.png.json",
        '{"objects": [{"classTitle": "cat"}]}',
    ): "in Supervisely run Export to COCO",
    ("a.geojson", '{"type": "FeatureCollection"'): "in QuPath export labelled images",
    ("RoiSet.zip", ""): "in ImageJ make label images",
    ("cell 1.roi", ""): "in ImageJ make label images",
    ("obj.names", "cat\n"): "choose an export of polygons",
    ("a.tfrecord", ""): "choose the export COCO",
    ("export.zip", ""): "unpack it",
    ("project.csv", "annotation_id,annotator,image"): "choose the export JSON",
}


@pytest.mark.parametrize("name, head", FOUND)
@pytest.mark.parametrize("kind", SCENES)
def test_where_nothing_is_found_the_export_to_choose_is_named(kind, name, head, tmp_path):
    (tmp_path / "s" / name).parent.mkdir(parents=True)
    (tmp_path / "s" / name).write_text(head)
    import_refused(kind, tmp_path / "s", rf"{Path(name).name} is .*: .*{FOUND[name, head]}")


def test_a_folder_of_another_format_of_ours_is_called_by_its_name(tmp_path):
    for kind, write in SCENES.items():
        write(tmp_path / kind)
    for kind in SCENES.keys() - {"masks"}:
        for reader in SCENES.keys() - {kind}:
            assert f"say --from {kind}" in hint(tmp_path / kind, reader), (kind, reader)
        assert hint(tmp_path / kind, kind) == ""
    import_refused("labelme", write_coco(tmp_path / "x"), "say --from coco-instances")
    import_refused("coco-instances", write_labelme(tmp_path / "y", ("a",)), "say --from labelme")
    assert hint(tmp_path / "nowhere", "yolo") == ""


@pytest.mark.parametrize("kind", ["yolo", "coco-instances"])
def test_an_export_that_lies_deeper_is_named(kind, tmp_path):
    export = SCENES[kind](tmp_path / "downloads" / "more" / "export")
    if kind == "coco-instances":
        (export / "annotations").mkdir()
        (export / "annotations.json").rename(export / "annotations" / "instances_train.json")
    words = rf"export/\S* is .*: did you mean --input {export}\?"
    import_refused(kind, tmp_path / "downloads", words)
