"""Files and folders, on local disks and on object storage."""
