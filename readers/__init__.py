"""Files in, arrays out: images, ground truth, masks, splits and annotations, each in the format
that it has on disk, with every fault said in one line. `data`, methods, report and tools may use
it; it uses `config` and `ground`, and knows no network.

    ground_truth    classes, the ground truth of an image, a data set
    pictures        image files: which count, how they are opened, which names they may have
    arrays          arrays and tensors as images
    large           those of more pixels than fit in memory, by parts
    sixteen_bit     stored values of 16 bits a channel, and how they become 8
    exposure        the white point of a set of 16-bit images
    stretch         images of differing exposure
    scale           how wide the objects of a data set are
    panoptic        images and maps in COCO panoptic format
    panoptic_json   its JSON: classes, and the segments of each image
    runs            masks as run lengths
    class_maps      images with a class for every pixel, a folder of one's own
    palettes        which colour a number of a map has
    name_lists      lists of classes as people write them
    semantic_sets   PASCAL VOC and Cityscapes so
    mask_files      SAM's masks on disk, and what they were made of
    instances       instances that overlap, and the things of other data sets
    splits          which images are labelled
    papers          the paper's data sets, once they are prepared
    downloads       where they come from and where they lie
    checks          what stops a run before it begins
    annotations     other tools' annotations, a file a format (a package)
"""
