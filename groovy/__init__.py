"""The Groovy scripts, as data of the package; patchcl_qupath/project/scripts.py reads them."""
