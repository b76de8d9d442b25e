"""The federated methods, one file for each paper, and the table of them."""
