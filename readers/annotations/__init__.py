"""Annotations of other tools, read into records of instances that can be drawn (for
`tools/importer.py`): a file a format, and what they share in `records.py` (images, names, files),
`shapes.py` (points to pixels), `maps.py` (whole numbers and colours to pixels) and `others.py`
(what other tools write, and which export of theirs to choose); `pairs.py` and `values.py` find the
masks of an image and what their values mean, for `masks.py`. A reader takes the folder and the
`Classes` to fill; it raises UserError for whatever is not what its format says, when an image's
turn comes at the latest.
"""

from readers.annotations.cityscapes import CITYSCAPES, read_cityscapes
from readers.annotations.coco import read_coco
from readers.annotations.files import survey
from readers.annotations.label_studio import read_label_studio
from readers.annotations.labelme import read_labelme
from readers.annotations.masks import FORMS, read_masks
from readers.annotations.records import REST, VOID, Classes, Instance, Record, Source
from readers.annotations.shapes import lay
from readers.annotations.yolo import read_yolo

READERS = {
    "labelme": read_labelme,
    "coco-instances": read_coco,
    "cityscapes": read_cityscapes,
    "masks": read_masks,
    "yolo": read_yolo,
    "label-studio": read_label_studio,
}
__all__ = ["READERS", "FORMS", "CITYSCAPES", "REST", "VOID"]
__all__ += ["Classes", "Instance", "Record", "Source", "lay", "survey"]
