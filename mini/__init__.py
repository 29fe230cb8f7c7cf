"""The miniature world: a procedural data set with a CLIP and a SAM of its own, which go through the
same code as the real ones. Nothing in it gives away what a real pipeline would not have. Engine
and tools may use it; it uses `pretrained` and the rooms below that.

    microcosm       scenes, captions and parts
    scenes          the world as a data set
    mini_clip       its CLIP, trained on captions
    mini_sam        its SAM
"""
