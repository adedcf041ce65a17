"""What is measured: the tables of cases, their inputs and their float64 oracles."""
