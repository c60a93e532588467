"""The benchmark behind ``graft compare``: every method under the same conditions, and an answer no finer than the evidence.

``config``       the settings
``splits``       train, validation and test rows, fixed once
``contenders``   what is compared: baselines and methods, sized to a budget
``plan``         which runs are wanted next, a function of the results so far
``job``          one run in a process of its own: train, evaluate, write ``result.json``
``forgetting``   what a run lost on general text
``workers``      processes that do the runs, here or (``ray_workers``) on a Ray cluster
``pruning``      which runs are clearly losing
``estimate``     time and memory beforehand
``comparison``   the loop over all of it
``results``      ``results.jsonl``: a line a run; ``json_lines`` reads and writes it and its like
``statistics``   intervals and paired tests over seeds and examples
``answer``       the answer in words
``report``       the answer as HTML and Markdown
"""
