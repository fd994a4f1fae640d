"""Is the challenger better than the champion? Benchmark, metrics, comparison, gate and report.

benchmark.py     the questions, fixed by hash          metrics.py        what one answer scores
run.py           a GGUF answers them; speed            answers.py        what a run keeps of an answer
comparison.py    two models, question by question      significance.py  could it be luck?
gate.py          the rule of promotion                 confidence.py    does confidence tell right from wrong?
figures.py       the table that every door shows       report.py        the page and the JSON; plots.py its pictures
"""
