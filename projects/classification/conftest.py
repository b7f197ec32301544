"""Being here, it puts this folder on the path of the tests, as the script does on its own."""

collect_ignore = ["train_net.py", "change_norms.py"]  # scripts, one named as one of tools
