"""Evaluation: benchmark two models, compare them, and decide whether the challenger is promoted.

benchmark.py     questions and expected answers, fixed by a hash
run.py           answers of a GGUF to the benchmark, and its speed
performance.py   requests per second at saturation, peak memory, cost of tokens
equivalence.py   whether two models' scores are equal within a margin (TOST)
scoring.py       scores of one answer
metrics/         what counts as correct
judging.py       verdicts of judges on both answers
comparison.py    two models on the same questions, with significance.py and constant_baseline.py
confidence.py    how well confidence separates correct from incorrect answers
gate.py          the rule of promotion
metric_table.py  the table of metrics
report.py        report.html and report.json, with plots.py
"""
