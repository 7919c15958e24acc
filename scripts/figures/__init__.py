"""The blocks of figures that pages are filled with, each made from the files that runs wrote."""
