"""What a run leaves behind: a LeRobotDataset, films, plots, a page.

Imports: of ki_edge: files, recordings.
"""
