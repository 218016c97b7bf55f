"""What the commands share: runs, their files, pictures and videos, the command line."""
