"""Being here, it puts this folder on the path of the tests, as the script does on its own."""

collect_ignore = ["train_net.py"]  # a script, whose name is that of tools/train_net.py
