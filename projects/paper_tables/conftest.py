"""Being here, it puts this folder on the path of the tests, as the scripts do on their own."""
