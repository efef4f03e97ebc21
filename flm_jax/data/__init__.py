"""Data: corpora, vocabularies, the token store, and batches read from it or streamed by seqio.

`source.open_data(DataConfig(...))` is the entry point. TensorFlow and seqio are imported only inside functions of
`reading.py`, `tables.py`, `tasks.py`, `tfds.py` and `streaming.py`, so a run on a prepared store never loads them.
"""
