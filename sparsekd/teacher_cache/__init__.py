"""A teacher's answers, kept: for students, methods and epochs that would all run it on the same rows.

    cache = sparsekd.TeacherCache(teacher, teacher.tap_names, rows=len(images), example_inputs=(images[:2],))
    print(cache)                                            # what it takes: nothing has been run or allocated yet
    for rows in torch.arange(len(images)).split(256):
        cache.add(rows, (images[rows],))
    ...
    losses = method.loss((images[rows],), labels[rows], cache[rows])

cache.py  what is kept of a row, and how it is asked for.
file.py   where that lies: in memory, or in a file that is mapped.
"""

from .cache import TeacherCache

__all__ = ["TeacherCache"]
