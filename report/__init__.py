"""What a person looks at: tables, pictures, the page of a run, and a run while it trains. It
decides nothing and changes no weight. Tools and `dearli` may use it; it uses `engine` and the
rooms below.

    drawing         tables of figures, maps drawn on images
    finish          the end of a stage: figures, table, metrics.json, report.html
    watch           figures and pseudo-labels as training goes on
    gallery         pictures of a run
    groups          PQ of groups of classes (Figure 5)
    page            report.html, from a template in templates/
    views           what the network will see, before a run: --dry-run --report
    warm_up         pictures of a warm-up
    run_folder      a run on disk, and the commands that make it again
    charts          its curves
    tables          the figures that people compare, for text and for pages
"""
