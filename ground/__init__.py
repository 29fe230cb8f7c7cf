"""What everybody may use and what uses nobody: the floor that all rooms stand on. Nothing here
knows an image, a class or a method. Every file above may import from it; it imports libraries
only.

    errors          the error that a user sees, and the nearest name to one that does not exist
    packages        which packages there are, and what to do about one that is missing
    files           files written whole or not at all; one writer at a time in a folder
    tensor_files    files of tensors, hashed and read without executing anything
    identity        digests: what a stored thing was made of
    ahead           the next thing is read while this one is worked on
    ranks           several processes as one
    colours         of classes and instances, for all eyes
"""
