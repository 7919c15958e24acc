"""What surrounds the things that the scripts beside this package measure; ../README.md lists its files."""
