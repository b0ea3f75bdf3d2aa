"""Rows of kept results, and cells of the tables that are drawn from them."""


def network(name, density=None, **metrics):
    base = {"mae": 0.9, "mse": 1.2, "weights_kept": density or 1.0, "train_seconds": 100.0, "train_joules": None}
    base |= {"joules_dense": None, "joules_frozen": None}
    return {"name": name, "method": name.lower(), "seed": 0, "target_density": density, "metrics": {**base, **metrics}}


def cells(text, *start):
    """Cells of the one table row that begins with these cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (found,) = [line for line in lines if tuple(line[: len(start)]) == start]
    return found[len(start) :]
