"""From the formats in which picture and caption collections come to shards: `simla prepare SOURCE`.

A source is a module with a generator rows(...) of rows.Row, whose keywords are its options in command.py. Everything
else is common: reading, checking and resizing (pictures), processes, shards, restarting and counting (writer).
"""

SOURCES = {
    "albef-json": "simla_ds.data.convert.albef_json",
    "coco": "simla_ds.data.convert.coco",
    "visual-genome": "simla_ds.data.convert.visual_genome",
    "img2dataset": "simla_ds.data.convert.img2dataset",
    "folder": "simla_ds.data.convert.folder",
}
"""The module of each source."""
