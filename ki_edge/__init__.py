"""What export and runtime share: errors, commands, configuration, graph signatures, the times of the flow.

Every folder of the project may import the files of this one; they import no folder.
"""
