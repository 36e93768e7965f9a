"""A search over a recipe: the space, the trials on Ray Tune, the table, the page."""
