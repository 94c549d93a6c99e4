"""What the documents' tables are made of, by kinds; `benchmarks.readme_tables` writes them."""
