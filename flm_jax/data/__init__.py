"""Data: corpora, vocabularies, the token store, and batches read from it or from seqio on the fly.

`source.open_data(DataConfig(...))` is the front door. TensorFlow and seqio are imported inside functions of
`reading.py`, `tasks.py` and `streaming.py` alone, so a run on a prepared store never loads them.
"""
