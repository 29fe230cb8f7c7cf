"""What others trained: CLIP, timm and SAM, found, checked and loaded, and the authors' checkpoints
read and written back. Methods, engine and tools may use it; it uses the network (`model`,
`inference`, `clip_ensemble`) and the rooms below that.

    foundation      OpenCLIP, timm and SAM: where weights come from, and their SHA-256
    fetching        files from a cache, or downloaded into it, checked
    segmenter       a segmenter on a pretrained backbone
    sam             SAM's masks of everything
    sam_fast        SAM's answers to the points of one image, in less time
    regions         stable regions, where no SAM has seen such images
    official        the authors' checkpoints, without detectron2
"""
