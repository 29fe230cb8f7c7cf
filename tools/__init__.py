"""Things beside the method: data in, runs out, tables and measurements. `dearli` wires them, and
nothing below uses them; they use every other room. `bench` is a program of its own (`python -m
tools.bench`).

    prepare         the paper's data sets
    importer        annotations of other tools as a data set
    validate        all that is wrong with a data set
    predict         a run on pictures
    exchange        its predictions for labelme, COCO tools and spreadsheets
    outlines        masks as polygons
    export          a run as one file
    zeroshot        CLIP alone on given masks
    ladder          tables of the paper on the miniature world
    bench           time and memory, beside others' code
    bench_works     what it measures
"""
