"""Streams of events in time order, read window by window and never whole.

    stream = EventStream(["2024-01.csv", "2024-02.parquet"], Columns(label="clicked"), window=3600.0)
    for window in stream:                        # a `Period`: inputs (numeric [B, F], ids [B, C]), clicks [B]
        ...
    stream.state_dict()                          # where it is; a new stream that loads this goes on from there

columns.py says which columns are what and makes numbers of them, files.py reads CSV and Parquet piece by piece and
finds new files, windows.py cuts windows and draws negatives, known.py names the streams that sparsekd knows, drift.py
makes clicks whose best possible prediction is known.
"""

from .columns import Columns, Events
from .drift import DriftingClicks
from .known import STREAMS, known
from .windows import ClickStream, EventStream, TableStream

__all__ = ["STREAMS", "ClickStream", "Columns", "DriftingClicks", "EventStream", "Events", "TableStream", "known"]
