"""Which networks a run trains, and how each learns: a file for each family of tasks, over network.py and recipe.py."""
