"""Published numbers as data, and this project's results beside them."""
