"""More than one batch, process or card: what `cmp.training` leaves to others at its seams."""
