"""Read the rows of files and folders of every format, and of data sets on the Hub."""
