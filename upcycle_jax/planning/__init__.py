"""What a conversion would cost, before it is run: estimated, traced and compiled."""
