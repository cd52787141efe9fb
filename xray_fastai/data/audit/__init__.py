"""`data check`: what is wrong with a data set."""
