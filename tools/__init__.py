"""Things beside the method: data in, runs out, tables and measurements. `dearli` wires them, and
nothing below uses them; they use every other room. `bench` and `baselines` are programs of their
own (`python -m tools.bench`).

    prepare         the paper's data sets
    prepare_instances   partitions of instances, and Cityscapes' maps as COCO's format
    importer        annotations of other tools as a data set
    import_notes    ... what it says about them
    joined          ... into a data set that is there
    validate        all that is wrong with a data set
    predict         a run on pictures
    large           ... of more pixels than fit in memory
    exchange        its predictions for labelme, COCO tools and spreadsheets
    outlines        masks as polygons
    export          a run as one file
    onnx_export     the same as a graph for other programs
    zeroshot        CLIP alone on given masks
    ladder          tables of the paper on the miniature world
    baselines       Otsu and a small U-Net, where one kind of object lies on a background
    bench           time and memory, beside others' code
    bench_works     what it measures of models, and of SAM
    bench_data      ... of reading and of evaluation
    bench_growth    ... of what grows, along each axis
    bench_gpu       the same for one device, by one command: a GPU, or a CPU at the smallest sizes
    bench_gpu_works     its steps at full size
    bench_gpu_paths     its stages, beside the CPU's
    bench_gpu_others    SAM, the official step, repeated runs, several processes
"""
