"""A run: from the command line to steps, checkpoints and figures. It knows methods by the contract
in `method` alone, and none of them by name. Methods, report and tools may use it; it uses `data`
and the rooms below that. `flags`, `checks` and `parser` import no library, so that a page of
help and a refusal are quick.

    flags           stages and flags, each said once
    checks          what is refused before anything is read
    idle            flags that do nothing beside others
    ranges          what values numbers may have
    parser          the parser, help pages, hints
    resolve         from the command line to what a stage needs
    request         images, places, machine, course: what the command line asks for
    method          what a method is to the frame
    begin           how a run begins, or goes on
    sameness        what makes a stored run another run
    training        steps, log, checkpoints, going on after a stop
    sessions        when and on what machine a run was trained
    rehearsal       --dry-run: what a run will cost
    optim           optimisers, schedules, clipping
    checkpoint      what a checkpoint holds, and which stay
    run_log         log.jsonl and the progress bar
    masks           the masks that a warm-up learns from
    windows         small objects and large images, seen in windows
    evaluation      every metric of every reading
    stored          a run, or an official file, as it is stored
"""
