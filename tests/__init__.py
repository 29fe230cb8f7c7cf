"""Tests of the wings; those of the paper's files are in `test_dearli.py`. They need no network and
no GPU.

    helpers              what they share: small data sets, short runs, a command line in one call
    test_house           the rules of the house, from its imports
    test_documents       what the documents say is true
    test_command_line    flags, help and refusals
    test_door            mistakes at the door, each answered in one line
    test_method          a method of one's own, from its first step to its report
    test_esl             soft labels, parts of objects and their contrast, against loops
    test_semantic        DeepLabv3+ and ESL on it, in the frame
    test_class_maps      folders of class maps: of one's own, VOC, Cityscapes
    test_run             files of runs and of the official code: foreign, damaged, written back
    test_pldc            PL-DC and Guided Distillation
    test_ranks           several processes
    test_stretch         images of differing exposure
    test_survival        runs that are stopped; `soak`
    test_fuzz            mutated files; `fuzz`
    test_readers         data sets, splits, pictures, masks
    test_importer        annotations of other tools
    test_class_values    ... maps of classes: lists, colours, folders as they are downloaded
    test_joined          ... into a data set that is there
    test_yolo            ... in YOLO's format
    test_label_studio    ... of Label Studio
    test_other_exports   what is said of those that are not read
    test_papers          the paper's data sets and tables
    test_instances       instances: inference, ground truth, run lengths, mask AP
    test_instance_files  ... in COCO's format, as a data set and as predictions
    test_instance_sets   ... of COCO and Cityscapes, prepared
    test_pretrained      foundation models and official files
    test_mini            the miniature world
    test_pipelines       stages one after the other
    test_predict         a run on pictures
    test_merging         panoptic inference by masks
    test_windows         small objects and large images, in windows
    test_ladder          tables over seeds, of several methods
    test_large           pictures of more pixels than fit in memory
    test_baselines       Otsu and a small U-Net, on drawn discs
    test_bench_data      benchmark inputs like life, and both sides of an evaluation
    test_bench_gpu       the measurements of a GPU, at their smallest
    test_onnx            a run as a graph for other programs
    test_page            report.html
    test_views           what a network will see, before a run
"""
