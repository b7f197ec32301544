"""Being here, it puts this folder on the path of the tests, as the script does on its own."""
