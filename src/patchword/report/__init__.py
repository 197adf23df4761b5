"""What a run did and how well: one list of sections, written as `report.html` and `MODEL_CARD.md`.

`record` reads the run directory, `words` says its figures, `sections` puts them in order, `page`
and `markdown` write them down.
"""
