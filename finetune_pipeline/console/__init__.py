"""The console: the loop in a browser, for people who never open a terminal.

    server.py     `finetune console`: Streamlit behind the checks of host and key
    access.py     who may do what: no login on this machine, otherwise API keys
    guard.py      these checks for every request, and the login page
    comparer.py   does comparisons in the background
    app.py        the script that Streamlit runs: the navigation
    known_loops.py the declared loops
    read_cache.py what pages read again and again
    session.py    what all pages share: the loop, the user, actions with their audit rows
    parts.py      pieces of pages: cards, tables, empty states
    training_form.py a field for every setting of training
    views/        one file per page (Streamlit would run files in a folder `pages` by itself)

It has no logic of its own: a page reads and acts through `pipeline/`, as the commands and the API do.
"""
