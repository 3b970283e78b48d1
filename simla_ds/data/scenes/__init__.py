"""The embedded data: composed scenes whose captions, boxes and answers are exact.

`prepare_scenes` (in `prepare`) writes them; `kit/` holds the drawings and photos with their licences.
One sample is `KEY.jpg` (RGB, square) and `KEY.json`:

    caption     lower case, no final stop, at most 28 words
    image_id    int, unique over all splits
    size        side of the picture in pixels; every box is [x, y, width, height] in those pixels
    background  kind "plain": name ("a teal background"), colour, rgb; kind "photo": name ("a windmill"), photo (file),
                plural, may_contain (key of the kit's backgrounds.json: things one cannot deny are there)
    objects     list, in the order of pasting: concept (kit id), name, category, colour (null: no one colour), turned
                (recoloured), size ("small" and "large" are plain to see and always come together in a scene; else
                "medium"), box, vendor
    relations   all that are clearly true: ["left of", i, j], ["above", i, j], ["next to", i, j] with i < j,
                ["between", m, i, j] with i < j. Not listed does not mean false: the case may be unclear.
                "right of" and "below" are the same facts turned round; `relations.places(box, size)` gives "top left"
    phrases     text, span [start, end) in the caption, objects (several for "two dogs"; none for the background), box
                (around all its objects; the whole picture for the background)
    claims      what the caption says beyond its phrases: relations as above in any order of i and j, ["at", i, place],
                ["bigger", i, j], ["count", n] (n objects in the picture)

Two objects of one scene are the same drawing (one phrase names them: "two dogs"), or the same thing in two plainly
different colours or sizes (phrases always say which), or things nobody would mix up.
"""
