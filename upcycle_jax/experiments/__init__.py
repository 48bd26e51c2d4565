"""Reading the results of runs, and the tables, plots and pages made from them."""
