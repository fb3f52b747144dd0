"""What users downloaded, read as untrusted data: folders and zips, LMDB, `.mat`, and the forms of LUPerson."""
