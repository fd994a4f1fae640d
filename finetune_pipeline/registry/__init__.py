"""Which models there are, which one serves, and how that came: versions, champion, switch, rollback, history, deletion.

    models.py        versions: values, names, numbering      comparisons.py   reports that were written
    champion.py      the one pointer, and what moves it      history.py       the rows it leaves, replayed
    deletion.py      model files that nobody needs           trainings.py     trainings that ended
    card.py          the model card

A model is named `loop@v1.2.0`; `loop@champion`, `loop@previous` and `loop@base` name what stands there now.
"""
